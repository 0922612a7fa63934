"""Images as they are found: class folders, captioned folders, WebDataset tar sets and Parquet files.

A source is listed once, in an order that is a matter of names and not of the file system; what is listed says where
each image's bytes lie, so that any worker can read any image by itself.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from workers.manifest import canonical_hash

Kind = Literal["folder", "webdataset", "parquet"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
MOST_TEXT = 2**20  # bytes of a label or caption
MOST_GROUP = 2**32  # bytes of the images of a Parquet row group, which is read as a whole
COMPANIONS = (".txt", ".json", ".cls")  # lie beside images and are none
_KIND_OF = {".tar": "webdataset", ".parquet": "parquet", **dict.fromkeys(IMAGE_SUFFIXES, "folder")}


class Place(NamedTuple):
    """Where the bytes of one image lie.

    Attributes:
        name: for people, unique in its source.
        file: below the source's root.
        at: byte where the image begins, or its row in a Parquet file.
        size: bytes of the image, or of the whole Parquet file.
        changed_ns: when the file was last changed, in nanoseconds; a piece encoded before that is encoded again.
    """

    name: str
    file: str
    at: int
    size: int
    changed_ns: int


class Source(NamedTuple):
    """A listed source: either `labels` with `num_classes`, or `captions`.

    Attributes:
        kind: how it is read.
        root: directory of the files.
        places: of the images.
        labels: class of each image in 0..n-1, each of which occurs; None where captions were asked for.
        captions: of each image; None where class labels were asked for.
        classes: names of the classes by label, for class folders; else empty.
        left_out: files below the root that are neither read nor known companions of what is, sorted; of a captioned
            folder also the .txt files without an image.
    """

    kind: Kind
    root: Path
    places: list[Place]
    labels: list[int] | None
    captions: list[str] | None
    classes: list[str]
    left_out: list[str]

    @property
    def num_classes(self) -> int:
        """Number of class labels; 0 with captions."""
        return max(self.labels) + 1 if self.labels else 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the images, and of their labels or captions and the classes' names."""
        values = self.labels if self.labels is not None else self.captions
        assert values is not None, "a source has labels or captions"
        rows = [[place.name, place.size, value] for place, value in zip(self.places, values, strict=True)]
        return canonical_hash([self.classes, rows])


_Found = tuple[Place, int | str]  # an image with its label or caption


def list_source(source: str, *, captions: bool) -> Source:
    """Lists a directory, a .tar or .parquet file, or a pattern (*, ?, [...]) of such files.

    Args:
        source: what to list. Class folders: one directory a class, in sorted order. WebDataset: members grouped by
            key, an image with .cls or .txt. Parquet: columns `image` (bytes, or a struct with `bytes`), and `label` or
            `caption`. Of an image with several frames the first is read.
        captions: whether the images' captions are wanted or their class labels. In folders an image's caption is the
            .txt file beside it.

    Raises:
        ValueError: nothing is there, it is of several kinds, or an image lacks what is wanted; a directory is below
            itself by a link, or a tar has links or goes on after its end.
    """
    root, files = _files(source)
    kinds = {kind: found for file in files if (kind := _KIND_OF.get(_suffix(file))) for found in [file]}
    if len(kinds) != 1:
        got = " and ".join(f"{kind} ({file})" for kind, file in sorted(kinds.items())) or "none"
        raise ValueError(
            f"source must hold images ({', '.join(IMAGE_SUFFIXES)}), .tar or .parquet files, one kind of them, "
            f"got {got} in {source}; correct the path"
        )
    (kind,) = kinds
    chosen = [file for file in files if _KIND_OF.get(_suffix(file)) == kind]
    left_out = [file for file in files if _suffix(file) not in (*_KIND_OF, *COMPANIONS)]
    if captions and kind == "folder":
        beside = {PurePosixPath(file).with_suffix(".txt").as_posix() for file in chosen}
        left_out = sorted([*left_out, *(file for file in files if file.endswith(".txt") and file not in beside)])
    classes: list[str] = []
    if kind == "folder":
        classes = [] if captions else _classes(root, chosen, files)
        found = list(_captioned(root, chosen, set(files)) if captions else _labelled(root, chosen, classes))
    else:
        list_file = _tar if kind == "webdataset" else _parquet
        found = [image for file in chosen for image in list_file(root, file, captions)]
    if not found:
        raise ValueError(f"source must hold images, got none in {source}; correct the path")
    places, wanted = [place for place, _ in found], [value for _, value in found]
    if captions:
        empty = next((place.name for place, caption in found if not str(caption).strip()), None)
        if empty is not None:
            raise ValueError(
                f"source must have words in every caption, got none for {empty}; write some, or remove the image"
            )
        return Source(kind, root, places, None, [str(caption) for caption in wanted], [], left_out)  # type: ignore[arg-type]
    labels = [int(label) for label in wanted]
    _check_labels(labels, places)
    return Source(kind, root, places, labels, None, classes, left_out)  # type: ignore[arg-type]


def is_there(source: str) -> bool:
    """Whether there is any file at a source: a mount point that is not mounted is an empty directory."""
    try:
        return bool(_files(source)[1])
    except ValueError:
        return False


def _files(source: str) -> tuple[Path, list[str]]:
    """The root and the sorted files below it, hidden ones left out."""
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        found, around = [], {str(path): {os.path.realpath(path)}}  # a directory: its own real path and those above
        for directory, folders, names in os.walk(path, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            above = around.pop(directory)
            for folder in folders:
                inner = os.path.join(directory, folder)
                if (real := os.path.realpath(inner)) in above:
                    raise ValueError(
                        f"source must have no directory below itself, got the link {inner} to {real}; remove it"
                    )
                around[inner] = {*above, real}
            below = Path(directory).relative_to(path).as_posix()
            found += [name if below == "." else f"{below}/{name}" for name in names if not name.startswith(".")]
        return path, sorted(found)
    if path.is_file():
        return path.parent, [path.name]
    matches = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
    if not matches or any(_suffix(match.name) not in (".tar", ".parquet") for match in matches):
        raise ValueError(
            f"source must be a directory, a .tar or .parquet file or a pattern of such files, got {source!r}, which "
            "names none; correct the path, which is a plain one and no URI (braces are not expanded, * and ? are)"
        )
    root = Path(os.path.commonpath([match.parent for match in matches]))
    return root, sorted(match.relative_to(root).as_posix() for match in matches)


def _suffix(file: str) -> str:
    return PurePosixPath(file).suffix.lower()


# --------------------------------------------------------------------------------------------------------- folders


def _classes(root: Path, images: Sequence[str], files: Sequence[str]) -> list[str]:
    """Names of the class directories, sorted."""
    flat = next((file for file in images if "/" not in file), None)
    if flat and f"{PurePosixPath(flat).stem}.txt" in files:
        raise _unasked(str(root))
    if flat:
        raise ValueError(
            f"source must be a folder of class directories, or images with a .txt caption beside each, got {flat} "
            f"directly in {root}; move the images into one directory a class"
        )
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    empty = set(classes) - {file.split("/")[0] for file in images}
    if empty:
        raise ValueError(f"source must have images in every class directory, got none in {root / min(empty)}")
    return classes


def _labelled(root: Path, images: Sequence[str], classes: Sequence[str]) -> Iterator[_Found]:
    label_of = {name: label for label, name in enumerate(classes)}
    for file in images:
        yield _image_file(root, file), label_of[file.split("/")[0]]


def _captioned(root: Path, images: Sequence[str], files: set[str]) -> Iterator[_Found]:
    for file in images:
        caption = PurePosixPath(file).with_suffix(".txt").as_posix()
        if caption not in files:
            raise _lacking("a .txt caption beside every image", str(root / file), True)
        _regular(root / caption)
        with (root / caption).open("rb") as content:
            yield _image_file(root, file), _text(content, caption)


def _image_file(root: Path, file: str) -> Place:
    about = _regular(root / file)
    return Place(file, file, 0, about.st_size, about.st_mtime_ns)


def _regular(path: Path) -> os.stat_result:
    """What a file is; of pipes and devices there is no end."""
    try:
        about = path.stat()
    except OSError as error:  # a broken link
        raise ValueError(f"source must have readable files, got {path} ({error.strerror}); remove it") from error
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"source must have regular files, got a pipe or device {path}; remove it")
    return about


# ------------------------------------------------------------------------------------------------------ WebDataset


def _tar(root: Path, file: str, captions: bool) -> Iterator[_Found]:
    """The images of one tar file, in the order of their keys' first members."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        changed_ns = (root / file).stat().st_mtime_ns
        with tarfile.open(root / file, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if member.isdir() or name.startswith("."):
                    continue
                if not member.isfile():
                    raise ValueError(
                        f"source must have files in a tar, got the link or device {member.name} in {file}; pack it "
                        "anew with tar --dereference --hard-dereference"
                    )
                stem, _, suffix = name.partition(".")
                group = groups.setdefault(f"{folder}/{stem}".lstrip("/"), {})
                if suffix.lower() in group:
                    raise ValueError(f"source must have one member of a name in a tar, got {member.name} twice: {file}")
                group[suffix.lower()] = member
            _check_end(root / file, tar.offset)
            for key, members in groups.items():
                name = f"{file}:{key}"
                images = [member for suffix, member in members.items() if f".{suffix}" in IMAGE_SUFFIXES]
                if len(images) != 1:
                    raise ValueError(f"source must have one image a key, got {len(images)} for {name}")
                wanted = members.get("txt" if captions else "cls")
                if wanted is None:
                    if not captions and "txt" in members:
                        raise _unasked(name)
                    what = ".txt caption" if captions else ".cls label"
                    raise _lacking(f"a {what} for every image", name, captions)
                content = tar.extractfile(wanted)
                assert content, "only files are listed"
                text = _text(content, name)
                place = Place(name, file, images[0].offset_data, images[0].size, changed_ns)
                yield place, text if captions else _label(text, name)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"source must hold whole, uncompressed tar files, got {root / file} ({error})") from error


def _check_end(path: Path, end: int) -> None:
    """A tar ends with blocks of zeros; tarfile takes a file that was cut off between two members for a whole one.

    Of two tars that were joined byte by byte it reads the first alone.
    """
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it was cut off")
        while rest := file.read(1 << 20):
            if any(rest):
                raise tarfile.ReadError("it goes on after its end; join tars by tar --concatenate, or keep them apart")


# --------------------------------------------------------------------------------------------------------- Parquet


def _parquet(root: Path, file: str, captions: bool) -> Iterator[_Found]:
    path, wanted = root / file, "caption" if captions else "label"
    try:
        with pq.ParquetFile(path) as content:
            schema, largest = content.schema_arrow, _largest_group(content.metadata)
            names = set(schema.names)
            values = content.read(columns=[wanted])[wanted] if wanted in names else None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"source must hold readable Parquet files, got {path} ({error})") from error
    if "image" not in names or not _holds_bytes(schema.field("image").type):
        got = schema.field("image").type if "image" in names else "none"
        raise ValueError(f"source must have a column image of bytes or of structs with bytes, got {got} in {path}")
    if values is None:
        if not captions and "caption" in names:
            raise _unasked(str(path))
        raise _lacking(f"a column {wanted}", str(path), captions)
    fits = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if not (fits if captions else pa.types.is_integer(values.type)):
        rule = "text" if captions else "integers"
        raise ValueError(f"source must have {rule} in the column {wanted}, got {values.type} in {path}")
    if largest > MOST_GROUP:
        raise ValueError(
            f"source must have at most {MOST_GROUP} bytes of images in a row group of Parquet, got {largest} in "
            f"{path}; write it anew with fewer rows a group"
        )
    about = path.stat()
    for row, value in enumerate(values.to_pylist()):
        name = f"{file}[{row}]"
        if value is None:
            raise _lacking(f"a {wanted} for every image", name, False)
        yield Place(name, file, row, about.st_size, about.st_mtime_ns), value


def _largest_group(about: pq.FileMetaData) -> int:
    """Bytes of the images in the largest row group, unpacked."""
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    columns = [[group.column(number) for number in range(group.num_columns)] for group in groups]
    sizes = [sum(c.total_uncompressed_size for c in of if c.path_in_schema.split(".")[0] == "image") for of in columns]
    return max(sizes, default=0)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


# ---------------------------------------------------------------------------------------------------------- wording


def _text(file: IO[bytes], name: str) -> str:
    content = file.read(MOST_TEXT + 1)  # of a sparse file there may be more than any memory holds
    if len(content) > MOST_TEXT:
        raise ValueError(f"source must have labels and captions of at most {MOST_TEXT} bytes, got more for {name}")
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"source must have labels and captions in UTF-8, got others for {name} ({error})") from error


def _label(text: str, name: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise ValueError(f"source must have whole numbers as .cls labels, got {text[:40]!r} for {name}; correct it")
    return int(text)


def _lacking(what: str, name: str, for_captions: bool) -> ValueError:
    mend = "add it"
    if for_captions:
        mend += " for sd3, which needs captions; for a model of class labels leave text_encoders out"
    return ValueError(f"source must have {what}, got none for {name}; {mend}")


def _unasked(name: str) -> ValueError:
    return ValueError(
        f"text_encoders must be given for captioned images, got none for {name}; give them for sd3, or class labels "
        "for another model"
    )


def _check_labels(labels: Sequence[int], places: Sequence[Place]) -> None:
    """0..n-1 for n classes: a gap is a mistake far more often than a class without images."""
    there = set(labels)
    wrong = next((row for row, label in enumerate(labels) if not 0 <= label < len(there)), None)
    if wrong is not None:
        raise ValueError(
            f"source must have the labels 0 to {len(there) - 1} for its {len(there)} classes, got {labels[wrong]} for "
            f"{places[wrong].name}; number the classes without a gap"
        )


# ---------------------------------------------------------------------------------------------------------- reading


class Reader:
    """Reads images of a listed source; quickest in the order of the listing."""

    def __init__(self, kind: Kind, root: Path) -> None:
        self.kind, self.root = kind, root
        self._file, self._starts, self._group = "", [0], -1
        self._parquet: pq.ParquetFile | None = None
        self._column: pa.ChunkedArray | None = None

    def read(self, place: Place) -> bytes | None:
        """The bytes of an image; None for a missing value in a Parquet file.

        Raises:
            ValueError: the file is not there, or not as it was when it was listed.
        """
        path = self.root / place.file
        try:
            if self.kind == "parquet":
                return self._cell(path, place)
            with path.open("rb") as file:
                file.seek(place.at)
                content = file.read(place.size + (self.kind == "folder"))  # one more: a file that has grown is noticed
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"source must be readable by every worker, got {path} ({error}); share it") from error
        if len(content) != place.size:
            raise _changed(path)
        return content

    def _cell(self, path: Path, place: Place) -> bytes | None:
        if place.file != self._file or self._parquet is None:
            if path.stat().st_size != place.size:
                raise _changed(path)
            self._parquet, self._file, self._group = pq.ParquetFile(path), place.file, -1
            about = self._parquet.metadata
            rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            self._starts = list(accumulate(rows, initial=0))
        group = bisect_right(self._starts, place.at) - 1
        if group != self._group or self._column is None:
            self._column, self._group = self._parquet.read_row_group(group, columns=["image"])["image"], group
        value = self._column[place.at - self._starts[group]].as_py()
        return value["bytes"] if isinstance(value, dict) else value


def _changed(path: Path) -> ValueError:
    return ValueError(f"source must not change while it is encoded, got another size of {path}; start again")
