"""Images to latents: which image goes into which Parquet shard, and the encoding of one shard.

The images are cut into logical shards, and those into batches of fixed size, by their places in the listing alone;
with one thread a batch's bytes depend on nothing else. So any number of workers writes the same files.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field, model_validator
from torch import Tensor

from mixflow_core.rng import generator
from workers import shards
from workers.codecs import (
    Codec,
    CodecConfig,
    centre_crop,
    dino_features,
    directory_hash,
    of_setting,
    open_codec,
    open_dinov2,
)
from workers.config import Frozen
from workers.data import CaptionTable, ImageSet, Split
from workers.pretrained import TextEncoders
from workers.shards import Statistics, write_captions, write_shard
from workers.sources import Kind, Place, Reader, Source, list_source

TRANSFORM = "adm_centre_crop"
# Pillow knows dozens of formats, whatever a file is called, and for some of them starts programs of the machine.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MOST_PIXELS = 89_478_485  # from here on Pillow warns of bombs: it takes some 700 MB to decode and convert so many
FEATURE_PATCH = 16  # pixels of the image for one alignment target
CODEC_PATHS = ("weights", "decoder", "statistics")
AHEAD = 2  # batches decoded while another is encoded


class Images(Frozen):
    """Images to be encoded.

    Attributes:
        source: local or shared path, see `workers.sources.list_source`; it must not change while it is encoded.
        held_out: images kept out of training, chosen by a fixed shuffle.
        flip: add a mirrored copy of every training image, where published training flips at random.
        keep_pixels: which images are kept as pixels beside their latents; metrics read the held-out ones.
        features: local directory of the DINOv2 that makes REPA's alignment targets; None without.
        features_sha256: directory_hash of it.
        text_encoders: local directory of SD3's text encoders: captions become the labels; None for class labels.
        text_encoders_sha256: directory_hash of it.
        batch_size: images of one call of the codec, which decides the last bits.
        rows_per_shard: most rows of a Parquet file.
        max_unreadable: images that may turn out to be unreadable; they are listed and left out.
    """

    source: str = Field(min_length=1)
    held_out: int = Field(ge=1)
    flip: bool = False
    keep_pixels: Literal["held_out", "all"] = "held_out"
    features: str | None = None
    features_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    text_encoders: str | None = None
    text_encoders_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    batch_size: int = Field(default=32, ge=1)
    rows_per_shard: int = Field(default=1024, ge=2)
    max_unreadable: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        for name in ("features", "text_encoders"):
            if (getattr(self, name) is None) != (getattr(self, f"{name}_sha256") is None):
                raise ValueError(
                    f"{name} and {name}_sha256 must be given together, got one; 64 times 'f' makes the error name it"
                )
        return self


class Shard(NamedTuple):
    """A logical shard: the images of one Parquet file, with their labels."""

    split: Split
    number: int
    places: Sequence[Place]
    labels: Sequence[int]


class Recipe(NamedTuple):
    """What every shard has in common."""

    settings: Images
    codec: CodecConfig
    kind: Kind
    root: Path
    num_classes: int

    @property
    def identity(self) -> dict[str, Any]:
        """What decides a shard's bytes besides its own images, plain JSON: everything but where files lie."""
        settings = self.settings.model_dump(
            mode="json", exclude={"source", "features", "text_encoders", "max_unreadable"}
        )
        codec = {name: value for name, value in asdict(self.codec).items() if name not in CODEC_PATHS}
        return {"settings": settings, "codec": codec, "transform": TRANSFORM, "num_classes": self.num_classes}

    def mirrors(self, split: Split) -> tuple[bool, ...]:
        """Whether mirrored, of each row that an image becomes."""
        return (False, True) if self.settings.flip and split == "train" else (False,)


class Plan(NamedTuple):
    """All that is to be done.

    Attributes:
        recipe: of every shard.
        shards: in the order of their rows, the held-out ones last.
        captions: by label; empty for class labels.
        classes: names of the classes by label, where the source has names.
        fingerprint: of the listing, like the next one see Source.
        left_out: files of the source that are not read.
    """

    recipe: Recipe
    shards: list[Shard]
    captions: list[str]
    classes: list[str]
    fingerprint: str
    left_out: list[str]

    @property
    def num_rows(self) -> dict[Split, int]:
        """Rows of each split, mirrored copies included, if every image is readable."""
        found: dict[Split, int] = {"train": 0, "held_out": 0}
        for shard in self.shards:
            found[shard.split] += len(shard.places) * len(self.recipe.mirrors(shard.split))
        return found

    @property
    def caption_parts(self) -> list[list[str]]:
        """The captions by file, the empty one as the last row of the last; none for class labels."""
        rows = [*self.captions, ""] if self.captions else []
        return [rows[start : start + shards.CAPTIONS_A_FILE] for start in range(0, len(rows), shards.CAPTIONS_A_FILE)]


class Unreadable(NamedTuple):
    """An image that could not be decoded, and why."""

    name: str
    reason: str


class Encoded(NamedTuple):
    """What became of a shard: no statistics (and no file) where none of its images was readable."""

    statistics: Statistics | None
    unreadable: list[Unreadable]


def plan_encoding(settings: Images, codec: CodecConfig) -> Plan:
    """Lists the source and cuts it into logical shards.

    Training images stay in the order of the listing, which is read fastest; held-out images are shuffled, because the
    first ones of them stand for all in the held-out loss.

    Raises:
        ValueError: what cannot be encoded, before a model is loaded.
    """
    if codec.channels != 3:
        raise ValueError(f"codec.channels must be 3 for encoded images, got {codec.channels}")
    if settings.features and codec.image_size % FEATURE_PATCH:
        raise ValueError(f"codec.image_size must be a multiple of {FEATURE_PATCH} for features, got {codec.image_size}")
    for name in ("features", "text_encoders"):
        _check_directory(name, getattr(settings, name), getattr(settings, f"{name}_sha256"))
    source = list_source(settings.source, captions=settings.text_encoders is not None)
    count = len(source.places)
    if count <= settings.held_out:
        raise ValueError(f"held_out must be less than the source's {count} images, got {settings.held_out}; lower it")
    order = torch.randperm(count, generator=generator(0, "order", 0)).tolist()
    rows: dict[Split, list[int]] = {
        "train": sorted(order[: -settings.held_out]),
        "held_out": order[-settings.held_out :],
    }
    labels, captions = _labels(source, rows)
    num_classes = len(captions) or source.num_classes
    shards = []
    for split, of_split in rows.items():
        size = settings.rows_per_shard // (2 if settings.flip and split == "train" else 1)
        for number, start in enumerate(range(0, len(of_split), size)):
            part = of_split[start : start + size]
            shards.append(Shard(split, number, [source.places[row] for row in part], [labels[row] for row in part]))
    recipe = Recipe(settings, codec, source.kind, source.root, num_classes)
    return Plan(recipe, shards, captions, source.classes, source.fingerprint, source.left_out)


def _check_directory(name: str, path: str | None, stated: str | None) -> None:
    if path is None:
        return
    with of_setting(name):
        found = directory_hash(Path(path))
    if found != stated:
        raise ValueError(f"{name}_sha256 must be the hash {found} of {path}, got {stated}; the files are others")


def _labels(source: Source, rows: dict[Split, list[int]]) -> tuple[list[int], list[str]]:
    """Label of each image and the distinct captions: those of held-out images first, as samples are drawn for them."""
    if source.labels is not None:
        missing = set(source.labels) - {source.labels[row] for row in rows["train"]}
        if missing:
            raise ValueError(
                f"held_out must leave training images of every class, got none of class {min(missing)}; lower it, or "
                "add images"
            )
        return source.labels, []
    assert source.captions is not None, "a source has labels or captions"
    captions = list(dict.fromkeys(source.captions[row] for split in ("held_out", "train") for row in rows[split]))
    label_of = {caption: label for label, caption in enumerate(captions)}
    return [label_of[caption] for caption in source.captions], captions


# -------------------------------------------------------------------------------------------------------- one shard


class Encoder:
    """Encodes shards; loads its models when the first one asks for them.

    Args:
        recipe: what the shards have in common.
        device: where the models compute.
        threads: that decode images; the bytes do not depend on it.
    """

    def __init__(self, recipe: Recipe, device: torch.device, threads: int = 1) -> None:
        self.recipe, self.device, self.threads = recipe, device, threads

    @cached_property
    def codec(self) -> Codec:
        """The codec, loaded and checked."""
        return open_codec(self.recipe.codec, self.device)

    @cached_property
    def features(self) -> Any:
        """The encoder of alignment targets, loaded and checked; None without."""
        settings = self.recipe.settings
        if settings.features is None or settings.features_sha256 is None:
            return None
        return open_dinov2(settings.features, settings.features_sha256, self.recipe.codec.image_size, self.device)

    @cached_property
    def text(self) -> TextEncoders:
        """The encoders of captions, loaded and checked."""
        assert self.recipe.settings.text_encoders, "captions are listed for text encoders alone"
        return TextEncoders(Path(self.recipe.settings.text_encoders))

    def encode_captions(self, captions: Sequence[str], path: Path) -> None:
        """Writes the embeddings of captions to one file.

        Raises:
            ValueError: the text encoders cannot be read.
            FloatingPointError: an embedding is not finite in float16.
        """
        text, pooled, size = list[np.ndarray](), list[np.ndarray](), self.recipe.settings.batch_size
        with _one_thread():
            for start in range(0, len(captions), size):
                batch = captions[start : start + size]
                for found, kept in zip(self.text.encode(batch, self.device), (text, pooled), strict=True):
                    values = found.to(torch.float16)
                    finite = torch.isfinite(values).flatten(1).all(1)
                    if not finite.all():
                        bad = batch[int(finite.int().argmin())]
                        raise FloatingPointError(f"embeddings must be finite in float16, but those of {bad!r} are not")
                    kept.append(values.cpu().numpy())
        write_captions(CaptionTable(np.concatenate(text), np.concatenate(pooled), list(captions)), path)

    def encode(self, shard: Shard, path: Path) -> Encoded:
        """Writes one shard to the Parquet file `path`.

        Raises:
            ValueError: the source or a model is not what it was said to be.
            FloatingPointError: a latent or feature is not finite.
        """
        recipe, unreadable = self.recipe, list[Unreadable]()
        parts: list[dict[str, np.ndarray]] = []
        with _one_thread():
            for batch in self._decoded(shard):
                unreadable += [Unreadable(place.name, found) for place, _, found in batch if isinstance(found, str)]
                good = [(place, label, found) for place, label, found in batch if not isinstance(found, str)]
                if not good:
                    continue
                pixels = torch.from_numpy(np.stack([found for _, _, found in good]))
                labels = np.array([label for _, label, _ in good], np.int64)
                for mirrored in recipe.mirrors(shard.split):
                    seen = pixels.flip(-1) if mirrored else pixels
                    parts.append(
                        {**self._columns(seen, shard.split, [place for place, _, _ in good]), "labels": labels}
                    )
        if not parts:
            return Encoded(None, unreadable)
        whole: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        part = ImageSet(codec=recipe.codec.description, **whole)
        write_shard(part, path, num_classes=recipe.num_classes)
        return Encoded(Statistics.of(part), unreadable)

    def _columns(self, pixels: Tensor, split: Split, places: Sequence[Place]) -> dict[str, np.ndarray]:
        """What is stored of one batch."""
        config = self.recipe.codec
        columns = {"images": self.codec.encode(pixels)}
        if self.features is not None:
            size = config.image_size // FEATURE_PATCH * self.features.config.patch_size
            columns["features"] = dino_features(self.features, pixels, size).to(torch.float16)
        for name, values in columns.items():
            finite = torch.isfinite(values).flatten(1).all(1)
            if not finite.all():
                bad = places[int(finite.int().argmin())].name
                raise FloatingPointError(f"{name} must be finite after encoding, but those of {bad} are not")
        if config.description and (split == "held_out" or self.recipe.settings.keep_pixels == "all"):
            columns["pixels"] = pixels
        # Contiguous, because sums over an array depend in their last bits on how it lies in memory.
        return {name: np.ascontiguousarray(values.cpu().numpy()) for name, values in columns.items()}

    def _decoded(self, shard: Shard) -> Iterator[list[tuple[Place, int, np.ndarray | str]]]:
        """Batches of (place, label, pixels or why there are none), some of them decoded ahead."""
        reader, step = Reader(self.recipe.kind, self.recipe.root), self.recipe.settings.batch_size
        ahead: deque[list[tuple[Place, int, Future[np.ndarray | str]]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(shard.places), step):
                rows = zip(shard.places[start : start + step], shard.labels[start : start + step], strict=True)
                ahead.append([(place, label, self._submit(pool, reader, place)) for place, label in rows])
                if len(ahead) > AHEAD:
                    yield [(place, label, found.result()) for place, label, found in ahead.popleft()]
            while ahead:
                yield [(place, label, found.result()) for place, label, found in ahead.popleft()]

    def _submit(self, pool: ThreadPoolExecutor, reader: Reader, place: Place) -> Future[np.ndarray | str]:
        """Reading waits for a disk or a network, so the threads do it too; Parquet comes in whole row groups."""
        size = self.recipe.codec.image_size
        if self.recipe.kind == "parquet":
            return pool.submit(_decode, reader.read(place), size)
        return pool.submit(lambda: _decode(reader.read(place), size))


def _decode(content: bytes | None, image_size: int) -> np.ndarray | str:
    """The image's centre as uint8 (3, S, S), or why there is none: Pillow raises all sorts of things at odd files."""
    if content is None:
        return "has no bytes"
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                return f"has {image.width} x {image.height} pixels, more than {MOST_PIXELS} altogether"
            return centre_crop(image, image_size)
    except MemoryError:  # says something about this machine, not about the image
        raise
    except UnidentifiedImageError:
        return "is no image of a known format"
    except Exception as error:
        # Without addresses of objects, so that the reason is the same in every process.
        return re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {' '.join(str(error).split())}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are split among torch's threads, so their number would show in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
