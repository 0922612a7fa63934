"""Sources of images, in every form that can be encoded, made of scikit-learn's digits in colour."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Picture(NamedTuple):
    """A digit (3, 32, 32) of uint8 that occurs once, its class and a caption that images share."""

    pixels: np.ndarray
    label: int
    caption: str

    @property
    def png(self) -> bytes:
        out = io.BytesIO()
        Image.fromarray(self.pixels.transpose(1, 2, 0)).save(out, "PNG")
        return out.getvalue()


@lru_cache(maxsize=1)
def _all() -> list[Picture]:
    from sklearn.datasets import load_digits

    source, found = load_digits(), []
    for number, (image, label) in enumerate(zip(source.images, source.target.tolist(), strict=True)):
        grey = np.round(image * (255 / 16)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
        pixels = np.stack([grey, 255 - grey, np.full_like(grey, 7 * (number % 30))])
        pixels[2, 0, :2] = divmod(number, 256)
        found.append(Picture(pixels, label, f"a hand-written {WORDS[label]}"))
    return found


def pictures(count: int = 40) -> list[Picture]:
    """The first digits, of all ten classes from ten on."""
    return _all()[:count]


def class_folder(root: Path, images: Sequence[Picture]) -> str:
    for number, image in reversed(list(enumerate(images))):
        path = root / WORDS[image.label] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.png)
    return str(root)


def captioned_folder(root: Path, images: Sequence[Picture]) -> str:
    root.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        (root / f"{number:04d}.png").write_bytes(image.png)
        (root / f"{number:04d}.txt").write_text(f"{image.caption}\n")
    return str(root)


def webdataset(root: Path, images: Sequence[Picture], *, labels: bool = True, captions: bool = False) -> str:
    """Two tar files."""
    root.mkdir(parents=True, exist_ok=True)
    for part, of_part in enumerate((images[: len(images) // 3], images[len(images) // 3 :])):
        with tarfile.open(root / f"part-{part}.tar", "w") as tar:
            for number, image in enumerate(of_part):
                key = f"{part}/{number:04d}"
                add_member(tar, f"{key}.png", image.png)
                if labels:
                    add_member(tar, f"{key}.cls", str(image.label).encode())
                if captions:
                    add_member(tar, f"{key}.txt", image.caption.encode())
    return str(root)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def parquet(root: Path, images: Sequence[Picture], *, struct: bool = False, **columns: Any) -> str:
    """Two files of several row groups each; `columns` replaces columns, None leaves one out."""
    root.mkdir(parents=True, exist_ok=True)
    contents: list[Any] = [image.png for image in images]
    given = {
        "image": [{"bytes": content, "path": None} for content in contents] if struct else contents,
        "label": [image.label for image in images],
        "caption": [image.caption for image in images],
        **columns,
    }
    table = pa.table({name: values for name, values in given.items() if values is not None})
    for part, of_part in enumerate((table.slice(0, len(images) // 3), table.slice(len(images) // 3))):
        pq.write_table(of_part, root / f"part-{part}.parquet", row_group_size=7)
    return str(root)
