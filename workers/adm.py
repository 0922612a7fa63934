"""Files of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py): its references, and samples for it."""

from __future__ import annotations

import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixflow_core.metrics import Gaussian

_IMAGES = "arr_0"
_POOLED, _SPATIAL = 2048, 2023  # features of the Inception: its pooled ones, and 17 x 17 x 7 of an inner layer
_SYMMETRY = 1e-6  # of the largest entry: a covariance may have been rounded to float32
_PART = 1 << 18  # bytes read at once


class AdmReference(NamedTuple):
    """What a reference says of a whole data set, and of the images that it holds beside.

    Attributes:
        mean: of the pooled features, (2048,) float64.
        covariance: their unbiased covariance, (2048, 2048) float64.
        spatial_mean: of sFID's features, (2023,) float64, in the order row, column, channel; None without.
        spatial_covariance: (2023, 2023) float64; None without.
        num_images: how many images it holds for precision and recall, fewer than the statistics are of (10,000 in the
            published one of ImageNet 256, 1,000 in that of 512); None without.
        image_size: their side in pixels; None without.
    """

    mean: Tensor
    covariance: Tensor
    spatial_mean: Tensor | None
    spatial_covariance: Tensor | None
    num_images: int | None
    image_size: int | None


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def read_reference(path: Path, *, image_size: int | None = None) -> AdmReference:
    """Statistics of a reference, without reading its images: see `read_images`.

    Args:
        path: an `.npz` with mu and sigma, perhaps with mu_s and sigma_s, perhaps with the images arr_0.
        image_size: side that its images must have, in pixels; where it has none, nothing tells.

    Raises:
        ValueError: the file is no complete `.npz`, an array is missing or has another shape, its values are not finite
            or no covariance, or the images have another size.
    """
    with _opened(path) as archive:
        names = set(archive.namelist())
        mean, covariance = _statistics(archive, path, ("mu", "sigma"), _POOLED)
        spatial: tuple[Tensor | None, Tensor | None] = (None, None)
        if names & {"mu_s.npy", "sigma_s.npy"}:
            spatial = _statistics(archive, path, ("mu_s", "sigma_s"), _SPATIAL)
        if f"{_IMAGES}.npy" not in names:
            return AdmReference(mean, covariance, *spatial, None, None)
        with _member(archive, path, _IMAGES) as (_, header):
            number, side, _, _ = _image_shape(header, path, image_size)
        return AdmReference(mean, covariance, *spatial, number, side)


def read_images(path: Path, batch_size: int, *, image_size: int | None = None) -> Iterator[Tensor]:
    """The images of a reference or of samples, uint8 (B, 3, H, W): one batch at a time, the last may be smaller.

    Raises:
        ValueError: the file is no complete `.npz`, or has no square images arr_0, uint8 (N, H, W, 3), of this size.
    """
    with _opened(path) as archive, _member(archive, path, _IMAGES) as (file, header):
        number, *shape = _image_shape(header, path, image_size)
        for start in range(0, number, batch_size):
            images = (min(batch_size, number - start), *shape)
            yield torch.from_numpy(_read(file, path, images, header.dtype)).permute(0, 3, 1, 2).contiguous()


def write_samples(path: Path, batches: Iterable[Tensor], shape: tuple[int, int, int, int]) -> None:
    """Writes samples as ADM's evaluator reads them: arr_0, uint8 (N, H, W, 3), uncompressed.

    One batch is in memory at a time. The file appears when it is complete, or not at all; the same images give the same
    bytes.

    Args:
        path: of the `.npz`, in a directory that exists.
        batches: uint8 (B, 3, H, W), N images altogether.
        shape: (N, H, W, 3).

    Raises:
        ValueError: the shape is none of images, or the batches are not of it.
    """
    number, *image = shape
    if number < 1 or min(image) < 1 or len(image) != 3 or image[2] != 3:
        raise ValueError(f"shape must be (N, H, W, 3) with at least one image, got {shape}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as raw:
            with zipfile.ZipFile(raw, "w") as archive, archive.open(f"{_IMAGES}.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(file, header)
                _write_batches(file, batches, shape)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_batches(file: IO[bytes], batches: Iterable[Tensor], shape: tuple[int, int, int, int]) -> None:
    number, height, width, channels = shape
    written = 0
    for batch in batches:
        if batch.dtype != torch.uint8 or tuple(batch.shape[1:]) != (channels, height, width):
            wanted = f"torch.uint8 (B, {channels}, {height}, {width})"
            raise ValueError(f"batches must be {wanted}, got {batch.dtype} {tuple(batch.shape)}")
        written += len(batch)
        if written > number:
            raise ValueError(f"batches must hold {number} images altogether, got at least {written}")
        file.write(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
    if written < number:
        raise ValueError(f"batches must hold {number} images altogether, got {written}")


# ------------------------------------------------------------------------------------------------------- reading


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise ValueError(f"reference {path} must be a local .npz file, got none")
    with _readable(path):
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What zipfile says of a file that is no archive, was cut short or altered, in one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"reference {path} must be a complete .npz file, got one that is not: {reason}") from error


@contextmanager
def _member(archive: zipfile.ZipFile, path: Path, name: str) -> Iterator[tuple[IO[bytes], _Header]]:
    """An array of the archive behind its header, which tells the truth about the bytes that follow."""
    if f"{name}.npy" not in archive.namelist():
        found = sorted(entry.removesuffix(".npy") for entry in archive.namelist())
        raise ValueError(f"reference {path} must have the array {name}, got {', '.join(found) or 'none'}")
    with _readable(path):
        file = archive.open(f"{name}.npy")
    with file:
        with _readable(path):
            header = _read_header(file, path, name)
            size = archive.getinfo(f"{name}.npy").file_size - file.tell()
        expected = math.prod(header.shape) * header.dtype.itemsize
        if size != expected:
            raise ValueError(f"reference {path}: {name} must have {expected} bytes for {header.shape}, got {size}")
        yield file, header


def _read_header(file: IO[bytes], path: Path, name: str) -> _Header:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"its format is {version}, not one of {sorted(readers)}")
        header = _Header(*readers[version](file))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"reference {path}: {name} must be an array in numpy's format; {reason}") from error
    if header.dtype.hasobject:
        raise ValueError(f"reference {path}: {name} must be numbers, got pickled objects, which are not read")
    return header


def _statistics(archive: zipfile.ZipFile, path: Path, names: tuple[str, str], size: int) -> tuple[Tensor, Tensor]:
    mean, covariance = (_array(archive, path, name, (size,) * rank) for name, rank in zip(names, (1, 2), strict=True))
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > _SYMMETRY * np.abs(covariance).max() or covariance.diagonal().min() < 0:
        raise ValueError(
            f"reference {path}: {names[1]} must be a covariance, symmetric with a diagonal of at least 0, got a "
            f"difference of {asymmetry:.3g} to its transpose and {covariance.diagonal().min():.3g} on its diagonal"
        )
    found = Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))
    try:
        _ = found.root  # a matrix that has none would be found only when samples are compared with it
    except ValueError as error:
        raise ValueError(f"reference {path}: {names[1]}: {error}") from error
    return found.mean, found.covariance


def _array(archive: zipfile.ZipFile, path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float array of this shape, float64 in C order."""
    with _member(archive, path, name) as (file, header):
        if header.shape != shape or header.dtype.kind != "f":
            raise ValueError(
                f"reference {path}: {name} must be floats {shape} as the FID-Inception has them, got {header.dtype} "
                f"{header.shape}"
            )
        stored = _read(file, path, shape, header.dtype)
    values = (stored.T if header.fortran_order else stored).astype(np.float64, order="C")
    if not np.isfinite(values).all():
        raise ValueError(f"reference {path}: {name} must be finite, got NaN or infinity")
    return values


def _image_shape(header: _Header, path: Path, image_size: int | None) -> tuple[int, int, int, int]:
    shape = header.shape
    if header.dtype != np.uint8 or header.fortran_order or len(shape) != 4 or shape[1:] != (shape[1], shape[1], 3):
        order = " in Fortran's order" * header.fortran_order
        raise ValueError(
            f"reference {path}: {_IMAGES} must be square images, uint8 (N, H, W, 3), got {header.dtype} {shape}{order}"
        )
    if min(shape) < 1:
        raise ValueError(f"reference {path}: {_IMAGES} must have at least one image, got {shape}")
    if image_size not in (None, shape[1]):
        raise ValueError(
            f"reference {path}: {_IMAGES} must be images of {image_size} pixels as the samples are, got {shape[1]}; "
            "take the reference of this resolution"
        )
    return shape[0], shape[1], shape[2], shape[3]


def _read(file: IO[bytes], path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next values; at the end of the member zipfile compares its checksum."""
    array = np.empty(shape, dtype)
    flat, done = array.reshape(-1).view(np.uint8), 0
    with _readable(path):
        while done < len(flat):
            # In parts: zipfile joins what it unpacks piece by piece, copying all of it each time.
            read = file.readinto(flat[done : done + _PART])  # type: ignore[attr-defined]
            if not read:
                raise EOFError(f"{len(flat) - done} bytes are missing")
            done += read
    return array
