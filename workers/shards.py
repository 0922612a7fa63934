"""Images as Parquet shards: written with their statistics, read and checked, and unpacked once a machine."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from workers.columns import as_column, describe_column, from_column, read_about, write_table
from workers.data import SPLITS, CaptionTable, ImageSet, Split, slice_of
from workers.disk import is_the_disks, room_for
from workers.manifest import MANIFEST, CorruptError, Manifest

SCHEMA_VERSION = 3
MOST_BYTES = 2**32  # of one shard in memory
MOST_CLASSES = 2**28  # a byte each while a set is counted
CAPTIONS_A_FILE = 256  # embeddings of SD3.5 are 2.6 MiB each
ARRAYS = ("images", "labels", "features", "pixels")
AXES = {"image": "NCHW", "features": "NTD", "pixels": "NCHW"}  # of a shard's columns

# ---------------------------------------------------------------------------------------------------- writing


def write_shards(splits: Mapping[Split, ImageSet], directory: Path, *, num_classes: int, rows: int = 4096) -> None:
    """Writes Parquet shards of at most `rows` images and statistics.json into an empty directory (no manifest)."""
    directory.mkdir(parents=True, exist_ok=True)
    statistics: dict[Split, list[Statistics]] = {}
    for split, images in splits.items():
        for number, start in enumerate(range(0, len(images.labels), rows)):
            part = slice_of(images, slice(start, start + rows))
            write_shard(part, shard_path(directory, split, number), num_classes=num_classes)
            statistics.setdefault(split, []).append(Statistics.of(part))
    write_statistics(statistics, directory)


def shard_path(directory: Path, split: Split, number: int) -> Path:
    """Where a shard lies; shards are read in the order of their numbers."""
    return directory / f"{split}-{number:05d}.parquet"


def write_shard(part: ImageSet, path: Path, *, num_classes: int) -> None:
    """One Parquet file, whose bytes depend on its content alone."""
    columns = {"image": part.images, "features": part.features, "pixels": part.pixels}
    given = {name: values for name, values in columns.items() if values is not None}
    about = {
        "schema_version": SCHEMA_VERSION,
        "num_classes": num_classes,
        "codec": part.codec,
        "columns": {name: describe_column(values) for name, values in given.items()},
    }
    arrays = {name: as_column(values) for name, values in given.items()}
    write_table({**arrays, "label": pa.array(part.labels, pa.int64())}, path, {"mixflow": json.dumps(about)})


def captions_path(directory: Path, number: int) -> Path:
    """Where a file of captions lies, beside the shards; labels are the captions' rows in the order of the files."""
    return directory / f"captions-{number:05d}.parquet"


def write_captions(part: CaptionTable, path: Path) -> None:
    """One file of captions, whose bytes depend on its content alone."""
    given = {"text": part.text, "pooled": part.pooled}
    about = {"schema_version": SCHEMA_VERSION, **{name: describe_column(values) for name, values in given.items()}}
    arrays = {name: as_column(values) for name, values in given.items()}
    write_table({"caption": pa.array(part.captions, pa.string()), **arrays}, path, {"mixflow": json.dumps(about)})


@dataclass(frozen=True)
class Statistics:
    """Counts and per-channel sums of a part, which add up in any order of parts to the same counts, and in one fixed
    order to the same bits.
    """

    num_images: int
    sums: tuple[float, ...]
    squares: tuple[float, ...]
    per_class: Mapping[int, int]
    per_channel: int

    @classmethod
    def of(cls, part: ImageSet) -> Statistics:
        """Statistics of one shard."""
        values = part.images.astype(np.float64)
        labels, counts = np.unique(part.labels, return_counts=True)
        return cls(
            num_images=len(part.labels),
            sums=tuple(values.sum((0, 2, 3)).tolist()),
            squares=tuple((values**2).sum((0, 2, 3)).tolist()),
            per_class=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
            per_channel=int(np.prod(part.images.shape[2:])),
        )


def write_statistics(statistics: Mapping[Split, Sequence[Statistics]], directory: Path) -> None:
    """statistics.json: number, mean and standard deviation by channel, images by class; parts added in their order."""
    found = {}
    for split, parts in statistics.items():
        num_images = sum(part.num_images for part in parts)
        count = num_images * parts[0].per_channel
        mean = [sum(values) / count for values in zip(*(part.sums for part in parts), strict=True)]
        square = [sum(values) / count for values in zip(*(part.squares for part in parts), strict=True)]
        per_class: dict[int, int] = {}
        for part in parts:
            for label, images in part.per_class.items():
                per_class[label] = per_class.get(label, 0) + images
        found[split] = {
            "num_images": num_images,
            "mean": mean,
            "std": [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True)],
            "per_class": {str(label): per_class[label] for label in sorted(per_class)},
        }
    (directory / "statistics.json").write_text(json.dumps(found, indent=1))


# ---------------------------------------------------------------------------------------------------- reading


def read_shards(directory: Path, split: Split) -> Iterator[tuple[ImageSet, int]]:
    """Every shard of a split, read and checked, with the number of classes.

    Raises:
        ValueError: a shard is unreadable, of another schema, shape or codec than the first, holds a value that is not
            finite or a label outside its classes; the message names the shard. Captions are counted, not read.
    """
    paths = sorted(directory.glob(f"{split}-*.parquet"))
    if not paths:
        raise ValueError(f"data must hold {split}-*.parquet, got none in {directory}; write it with write_shards")
    num_captions, first = _count_captions(directory), None
    for path in paths:
        part, num_classes = _read_shard(path)
        if num_captions and num_classes != num_captions - 1:
            raise ValueError(
                f"data shard {path} must be of the {num_captions - 1} captions with embeddings beside it, got "
                f"{num_classes} captions; encode them together"
            )
        kind = (part.shape, part.images.dtype, num_classes, part.codec, part.features is None, part.pixels is None)
        first = first or kind
        if kind != first:
            raise ValueError(f"data shards must all have one shape, codec and number of classes; {path.name} differs")
        yield part, num_classes


def facts_of(directory: Path, split: Split) -> dict[str, Any]:
    """What a split is, after reading and checking all of it; plain JSON.

    Returns:
        `num_images`, `shape` [C, H, W] of what a model sees, `dtype` and `codec` of what is stored, `num_classes`,
        `absent_class` (the first without an image, or None), `rms` (root mean square of what a model sees), `features`
        [T, D] or None, `image_size` of the pixels that were kept or None, and `has_captions`.

    Raises:
        ValueError: see read_shards.
    """
    facts: dict[str, Any] = {}
    present, count, squares = np.zeros(0, bool), 0, 0.0
    for part, num_classes in read_shards(directory, split):
        if not facts:
            present = np.zeros(num_classes, bool)
            seen = part.images if part.codec is None else part.pixels
            facts = {
                "shape": list(part.shape),
                "dtype": str(part.images.dtype),
                "codec": part.codec,
                "num_classes": num_classes,
                "features": None if part.features is None else list(part.features.shape[1:]),
                "image_size": None if seen is None else seen.shape[-1],
                "has_captions": _count_captions(directory) > 0,
            }
        present[part.labels] = True
        count += len(part.labels)
        squares += float(part.x1(slice(None)).square().mean((1, 2, 3), dtype=torch.float64).sum())
    if split == SPLITS[0]:
        for _ in read_captions(directory):  # checked once, as they serve all splits
            pass
    absent = None if present.all() else int(present.argmin())
    return {**facts, "num_images": count, "absent_class": absent, "rms": math.sqrt(squares / count)}


def read_captions(directory: Path) -> Iterator[CaptionTable]:
    """The captions beside the shards, file by file; nothing for a set with class labels.

    Raises:
        ValueError: a file is unreadable, or an embedding is not finite.
    """
    for path in _caption_paths(directory):
        try:
            table = pq.read_table(path)
            about = read_about(table)
            _require_version(path, about["schema_version"])
            text, pooled = (from_column(table, name, about[name]) for name in ("text", "pooled"))
            captions = table["caption"].to_pylist()
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            if is_the_disks(error):
                raise
            raise ValueError(f"{path} must be a Parquet file of caption embeddings; {error}") from error
        for name, values in (("text", text), ("pooled", pooled)):
            finite = np.isfinite(values).reshape(len(values), -1).all(1)
            if not finite.all():
                row = int(finite.argmin())
                raise ValueError(
                    f"{path}: {name} embeddings must be finite, got others for {captions[row]!r} in row {row}"
                )
        yield CaptionTable(text, pooled, captions)


def _caption_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("captions-*.parquet"))


def _count_captions(directory: Path) -> int:
    """Captions beside the shards, the empty one included."""
    try:
        return sum(pq.read_metadata(path).num_rows for path in _caption_paths(directory))
    except (OSError, pa.ArrowException) as error:
        if is_the_disks(error):
            raise
        raise ValueError(f"{directory} must hold readable files of caption embeddings; {error}") from error


def _require_version(path: Path, version: int) -> None:
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} must have schema version {SCHEMA_VERSION}, got {version}; write it anew")


def _check_size(path: Path) -> None:
    """A few repeated bytes of Parquet can stand for more images than any memory holds."""
    about = pq.ParquetFile(path)
    widths = [kind.byte_width if pa.types.is_fixed_size_binary(kind) else 8 for kind in about.schema_arrow.types]
    size = about.metadata.num_rows * sum(widths)
    if size > MOST_BYTES:
        raise ValueError(f"it must unpack to at most {MOST_BYTES} bytes, got {size}; write fewer rows in a file")


def _read_shard(path: Path) -> tuple[ImageSet, int]:
    try:
        _check_size(path)
        table = pq.read_table(path)
        about = read_about(table)
        version, num_classes = about["schema_version"], about["num_classes"]
        if version == SCHEMA_VERSION:
            if type(num_classes) is not int or not 1 <= num_classes <= MOST_CLASSES:
                raise ValueError(f"num_classes must be an integer from 1 to {MOST_CLASSES}, got {num_classes!r:.40}")
            columns, codec = about["columns"], about["codec"]
            if not isinstance(columns, dict) or "image" not in columns:
                raise ValueError(f"columns must be a map with image, got {columns!r:.80}")
            if codec is not None and not (isinstance(codec, dict) and isinstance(codec.get("kind"), str)):
                raise ValueError(f"codec must be null or have a kind, got {codec!r:.80}")
            values = {name: from_column(table, name, column) for name, column in columns.items()}
            for name, axes in AXES.items():
                if name in values and values[name].ndim != len(axes):
                    raise ValueError(f"{name} must have the axes {axes}, got {values[name].shape}")
            if not pa.types.is_integer(table["label"].type):
                raise TypeError(f"label must be a column of integers, got {table['label'].type}")
            labels = table["label"].cast(pa.int64()).fill_null(-1).to_numpy()  # a missing label is none of the classes
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        if is_the_disks(error):
            raise
        raise ValueError(f"data shard {path} must be a Parquet file of this project's schema; {error}") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"data shard {path} must have schema version {SCHEMA_VERSION}, got {version}; write it anew")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"data shard {path}: label must lie in [0, {num_classes - 1}], got {labels[bad[0]]} in row {bad[0]}"
        )
    for name, array in values.items():
        finite = np.isfinite(array).reshape(len(array), -1).all(1)
        if not finite.all():
            raise ValueError(
                f"data shard {path}: {name} values must be finite, got NaN or infinity in row {finite.argmin()}"
            )
    return ImageSet(values["image"], labels, codec, values.get("features"), values.get("pixels")), num_classes


def open_shards(directory: Path, manifest: Manifest, cache: Path) -> dict[Split, ImageSet]:
    """Memory-mapped splits of a verified directory: unpacked once a machine into `cache`, keyed by content.

    Row groups of Parquet cannot be read at random one image at a time; a memory map can, and it is shared by all
    workers of a machine through the page cache.

    Raises:
        ValueError: see read_shards. CorruptError: a file is not what the manifest says, or was replaced meanwhile.
        NoRoomError: the cache's disk is full.
    """
    home = cache / f"{manifest.digest[:16]}-{SCHEMA_VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_complete(home):
            shutil.rmtree(home, ignore_errors=True)
            for left in cache.glob(f".unpacking-{home.name}-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(dir=cache, prefix=f".unpacking-{home.name}-"))
            try:
                for split in SPLITS:
                    _unpack(directory, split, scratch)
                _unpack_captions(directory, scratch)
                # Looked at again: it may have been replaced while it was read.
                if problems := manifest.problems(directory):
                    raise CorruptError(str(directory), *problems[0].split(" ", 1))
                (scratch / MANIFEST).write_text(Manifest.describe(scratch, {}).to_json())
                os.replace(scratch, home)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    captions = None
    if (home / "captions.json").exists():
        names = json.loads((home / "captions.json").read_text())
        text, pooled = (np.load(home / f"{name}.npy", mmap_mode="r") for name in ("text", "pooled"))
        captions = CaptionTable(text, pooled, names)
    return {split: _mapped(home, split, captions) for split in SPLITS}


def _unpack(directory: Path, split: Split, scratch: Path) -> None:
    """One shard at a time: a published set is larger than memory."""
    total = sum(pq.read_metadata(path).num_rows for path in directory.glob(f"{split}-*.parquet"))
    maps = _Maps(scratch, f"{split}-", total)
    for part, _ in read_shards(directory, split):
        maps.append({name: values for name in ARRAYS if (values := getattr(part, name)) is not None})
    maps.flush()
    (scratch / f"{split}.json").write_text(json.dumps(part.codec))


def _unpack_captions(directory: Path, scratch: Path) -> None:
    """One file at a time, as with the shards."""
    maps, names = _Maps(scratch, "", _count_captions(directory)), list[str]()
    for part in read_captions(directory):
        maps.append({"text": part.text, "pooled": part.pooled})
        names += part.captions
    maps.flush()
    if names:
        (scratch / "captions.json").write_text(json.dumps(names))


class _Maps:
    """Arrays of `total` rows in files, filled from their start."""

    def __init__(self, directory: Path, prefix: str, total: int) -> None:
        self.directory, self.prefix, self.total = directory, prefix, total
        self._maps: dict[str, np.memmap[Any, Any]] = {}
        self._filled = 0

    def append(self, part: Mapping[str, np.ndarray]) -> None:
        """The next rows of every array; the first ones say which arrays there are."""
        for name, values in part.items():
            if name not in self._maps:
                file, shape = self.directory / f"{self.prefix}{name}.npy", (self.total, *values.shape[1:])
                array = np.lib.format.open_memmap(file, mode="w+", dtype=values.dtype, shape=shape)
                size = file.stat().st_size
                # A map's file has holes, and a disk that is full when they are filled is the process's end.
                with room_for(file, size), file.open("r+b") as holes:
                    os.posix_fallocate(holes.fileno(), 0, size)
                self._maps[name] = array
            self._maps[name][self._filled : self._filled + len(values)] = values
        self._filled += len(values)

    def flush(self) -> None:
        """Waits until all of it is in the files."""
        for array in self._maps.values():
            array.flush()


def _mapped(home: Path, split: Split, captions: CaptionTable | None) -> ImageSet:
    arrays = {name: np.load(path, mmap_mode="r") for name in ARRAYS if (path := home / f"{split}-{name}.npy").exists()}
    codec = json.loads((home / f"{split}.json").read_text())
    return ImageSet(codec=codec, captions=captions, **arrays)


def _is_complete(home: Path) -> bool:
    """Whether an unpacked set is there in full: cleaners of temporary directories remove single files."""
    try:
        files = Manifest.from_json((home / MANIFEST).read_bytes()).files
        return all((home / name).stat().st_size == entry.size for name, entry in files.items())
    except (FileNotFoundError, ValueError):
        return False
