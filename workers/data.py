"""Images as Parquet shards, and their batches in an order that is pure arithmetic."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mixflow_core.rng import generator, shard_position
from workers.config import RunConfig
from workers.manifest import MANIFEST, Manifest
from workers.models.sit import drop_labels

SCHEMA_VERSION = 1
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


class ImageSet(NamedTuple):
    """Images (N, C, H, W), uint8 pixels or float latents, with labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray

    def x1(self, rows: np.ndarray | slice) -> Tensor:
        """What a model sees: pixels mapped to [-1, 1], latents as they are; float32."""
        values = torch.from_numpy(np.require(self.images[rows], requirements="W"))
        return values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values.float()

    def y(self, rows: np.ndarray | slice) -> Tensor:
        """Labels (B,)."""
        return torch.from_numpy(np.require(self.labels[rows], requirements="W"))


def to_pixels(x: Tensor) -> Tensor:
    """Inverse of ImageSet.x1 for pixels: round to nearest after clamping, uint8. Part of the protocol."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------- writing


def digits(image_size: int, held_out: int) -> dict[Split, ImageSet]:
    """scikit-learn's handwritten digits (1,797 real 8 x 8 images, 10 classes), enlarged (bicubic) where asked.

    The last `held_out` images after a fixed shuffle are held out: the file is ordered by writer, and a plain cut would
    give the two parts different hands.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)
    if image_size != 8:
        size = (image_size, image_size)
        pixels = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pixels])
    order = torch.randperm(len(pixels), generator=generator(0, "order", 0)).numpy()
    images, labels = pixels[order][:, None], source.target[order].astype(np.int64)
    cut = len(images) - held_out
    return {"train": ImageSet(images[:cut], labels[:cut]), "held_out": ImageSet(images[cut:], labels[cut:])}


def write_shards(splits: Mapping[Split, ImageSet], directory: Path, *, num_classes: int, rows: int = 4096) -> None:
    """Writes Parquet shards of at most `rows` images and statistics.json into an empty directory (no manifest)."""
    directory.mkdir(parents=True, exist_ok=True)
    statistics: dict[str, Any] = {}
    for split, (images, labels) in splits.items():
        for number, start in enumerate(range(0, len(images), rows)):
            part = images[start : start + rows]
            flat = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), int(np.prod(part.shape[1:])))
            about = {
                "schema_version": SCHEMA_VERSION,
                "shape": list(part.shape[1:]),
                "dtype": str(part.dtype),
                "num_classes": num_classes,
            }
            table = pa.table({"image": flat, "label": pa.array(labels[start : start + rows], pa.int64())})
            table = table.replace_schema_metadata({"mixflow": json.dumps(about)})
            pq.write_table(table, directory / f"{split}-{number:05d}.parquet")
        statistics[split] = {
            "num_images": len(images),
            "mean": images.astype(np.float64).mean((0, 2, 3)).tolist(),
            "std": images.astype(np.float64).std((0, 2, 3)).tolist(),
            "per_class": np.bincount(labels, minlength=num_classes).tolist(),
        }
    (directory / "statistics.json").write_text(json.dumps(statistics, indent=1))


# ---------------------------------------------------------------------------------------------------- reading


def read_shards(directory: Path, split: Split) -> tuple[ImageSet, int]:
    """Reads and checks every shard of a split; returns the images and the number of classes.

    Raises:
        ValueError: a shard is unreadable, of another schema or shape than the first, holds a value that is not finite
            or a label outside its classes; the message names the shard.
    """
    paths = sorted(directory.glob(f"{split}-*.parquet"))
    if not paths:
        raise ValueError(f"data must hold {split}-*.parquet, got none in {directory}; write it with write_shards")
    parts = [_read_shard(path) for path in paths]
    for path, (images, _, num_classes) in zip(paths, parts, strict=True):
        if images.shape[1:] != parts[0][0].shape[1:] or num_classes != parts[0][2]:
            raise ValueError(f"data shards must all have one shape and number of classes; {path.name} differs")
    return ImageSet(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])), parts[0][2]


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"mixflow"])
        version = about["schema_version"]
        flat = table["image"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        values = flat.reshape(table.num_rows, *about["shape"])  # a missing value reads as NaN
        if not pa.types.is_integer(table["label"].type):
            raise TypeError(f"label must be a column of integers, got {table['label'].type}")
        labels = table["label"].cast(pa.int64()).fill_null(-1).to_numpy()  # a missing label is none of the classes
        dtype, num_classes = np.dtype(about["dtype"]), about["num_classes"]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data shard {path} must be a Parquet file of this project's schema; {error}") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"data shard {path} must have schema version {SCHEMA_VERSION}, got {version}")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"data shard {path}: label must lie in [0, {num_classes - 1}], got {labels[bad[0]]} in row {bad[0]}"
        )
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise ValueError(
            f"data shard {path}: image values must be finite, got NaN or infinity in row {finite.argmin()}"
        )
    return values.astype(dtype, copy=False), labels, num_classes


def open_shards(directory: Path, manifest: Manifest, cache: Path) -> dict[Split, ImageSet]:
    """Memory-mapped splits of a verified directory: unpacked once a machine into `cache`, keyed by content.

    Row groups of Parquet cannot be read at random one image at a time; a memory map can, and it is shared by all
    workers of a machine through the page cache.
    """
    home = cache / manifest.digest[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_complete(home):
            shutil.rmtree(home, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(dir=cache, prefix=".unpacking-"))
            for split in SPLITS:
                images, _ = read_shards(directory, split)
                np.save(scratch / f"{split}-images.npy", images.images)
                np.save(scratch / f"{split}-labels.npy", images.labels)
            (scratch / MANIFEST).write_text(Manifest.describe(scratch, {}).to_json())
            os.replace(scratch, home)
    return {
        split: ImageSet(
            np.load(home / f"{split}-images.npy", mmap_mode="r"), np.load(home / f"{split}-labels.npy", mmap_mode="r")
        )
        for split in SPLITS
    }


def _is_complete(home: Path) -> bool:
    """Whether an unpacked set is there in full: cleaners of temporary directories remove single files."""
    try:
        files = Manifest.from_json((home / MANIFEST).read_bytes()).files
        return all((home / name).stat().st_size == entry.size for name, entry in files.items())
    except (FileNotFoundError, ValueError):
        return False


# ---------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs: data x1, labels y (already dropped), noise x0, uniforms u (B, 2) for (t, m)."""

    x1: Tensor
    y: Tensor
    x0: Tensor
    u: Tensor

    def to(self, device: torch.device) -> Batch:
        """A copy on a device; from pinned memory it does not wait."""
        if device.type == "cpu":
            return self
        return Batch(*(v.pin_memory().to(device, non_blocking=True) for v in (self.x1, self.y, self.x0, self.u)))


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return torch.randperm(num_images, generator=generator(seed, "order", epoch)).numpy()


def batch_rows(seed: int, start: int, count: int, num_images: int) -> np.ndarray:
    """Rows start .. start + count - 1 of the endless sequence of epochs, each a seeded permutation of all images."""
    first, last = start // num_images, (start + count - 1) // num_images
    if first == last:  # nearly always, and the loop should not wait for it
        return _epoch_order(seed, first, num_images)[start % num_images :][:count]
    positions = np.arange(start, start + count)
    epochs, places = positions // num_images, positions % num_images
    return np.concatenate(
        [_epoch_order(seed, int(epoch), num_images)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    )


def shard_batch(run: RunConfig, data: ImageSet, step: int, shard: int) -> Batch:
    """Logical shard `shard` of the global batch of `step`: a function of its position alone."""
    training = run.training
    size = training.global_batch_size // training.num_shards
    start = step * training.global_batch_size + shard * size
    rows = batch_rows(run.seed, start, size, len(data.labels))
    position = shard_position(step, shard, training.num_shards)
    x1 = data.x1(rows)
    u_drop = torch.rand(size, generator=generator(run.seed, "dropout", position))
    return Batch(
        x1=x1,
        y=drop_labels(data.y(rows), u_drop, run.model),
        x0=torch.randn(x1.shape, generator=generator(run.seed, "noise", position)),
        u=torch.rand(size, 2, generator=generator(run.seed, "time", position)),
    )


def join(batches: list[Batch]) -> Batch:
    """Shards joined into one batch, in their order."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        x1=torch.cat([b.x1 for b in batches]),
        y=torch.cat([b.y for b in batches]),
        x0=torch.cat([b.x0 for b in batches]),
        u=torch.cat([b.u for b in batches]),
    )
