"""Pixels <-> latents: the identity, AutoencoderKL and the representation autoencoder (RAE), and REPA's features.

Three words: `pixels` are uint8 images, `stored` is what a data set keeps of them, `latent` is what a network sees.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from workers.manifest import measure
from workers.models.rae_decoder import load_rae_decoder, load_rae_statistics
from workers.pretrained import load_dinov2, load_vae, read_json

Rounding = Literal["round", "half_up", "truncate"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RAE_PATCH = 16  # pixels of the image for one latent, whatever the encoder's own patch
_HASHED_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
SETTLED_NS = 2 * 10**9  # two changes within a tick of the file system's clock have one time
_SOURCES = {
    "identity": (),
    "vae": ("weights", "decoder"),
    "rae": ("weights", "decoder", "statistics"),
}


@dataclass(frozen=True)
class CodecConfig:
    """How images become latents and latents images: a part of the protocol of every number.

    Attributes:
        kind: `identity` (pixels themselves), `vae` (AutoencoderKL) or `rae` (DINOv2 and a ViT decoder).
        image_size: side of the square images in pixels.
        rounding: of decoded images to uint8. `round`: to the nearest, this project's own; `half_up`: to the nearest by
            adding 1/2 and truncating, as SiT's sampler does; `truncate`: towards zero, as REPA's and RAE's do.
        channels: of the images; only the identity takes others than 3.
        weights: directory of the autoencoder in diffusers' layout, or of the DINOv2 in transformers' layout.
        sha256: directory_hash of `weights`.
        scale: of the vae's latents, positive: latent = (z - shift) * scale. 0.18215 for Stable Diffusion's first
            autoencoders (SiT, REPA), 1.5305 for SD3's.
        shift: of the vae's latents: 0, or 0.0609 for SD3's.
        posterior: whether the vae's latents are drawn from the posterior or are its mean.
        decoder: RAE's ViT decoder, a `.pt` or `.safetensors` state dict; or a second autoencoder in diffusers' layout
            for a vae whose samples are decoded by another one than encoded the data (REPA's), else left out.
        decoder_sha256: SHA-256 of that file, or directory_hash of that directory.
        decoder_heads: its attention heads, which a state dict does not tell: 16 in ViT-L and ViT-XL, 12 in ViT-B.
        statistics: RAE's `mean` and `var` of the latents, element by element (`stat.pt`).
        statistics_sha256: SHA-256 of that file.
    """

    kind: Literal["identity", "vae", "rae"]
    image_size: int
    rounding: Rounding = "round"
    channels: int = 3
    weights: str = ""
    sha256: str = ""
    scale: float = 0.0
    shift: float = 0.0
    posterior: Literal["sample", "mean"] = "sample"
    decoder: str = ""
    decoder_sha256: str = ""
    decoder_heads: int = 16
    statistics: str = ""
    statistics_sha256: str = ""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when a setting is missing, out of its range, or of another kind of codec."""
        for name in ("image_size", "channels", "decoder_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.channels != 3 and self.kind != "identity":
            raise ValueError(f"channels must be 3 for the codec {self.kind}, got {self.channels}")
        if self.kind == "rae" and self.image_size % _RAE_PATCH:
            raise ValueError(f"image_size must be a multiple of {_RAE_PATCH} for rae, got {self.image_size}")
        if self.kind == "identity" and self.rounding != "round":
            raise ValueError(f"rounding must be round for the codec identity, got {self.rounding}; leave it out")
        for name in ("weights", "decoder", "statistics"):
            self._check_source(name, "sha256" if name == "weights" else f"{name}_sha256")
        if self.kind == "vae" and not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive, got {self.scale}; 0.18215 for SD's, 1.5305 for SD3's")
        if self.kind != "vae" and (self.scale, self.shift, self.posterior) != (0, 0, "sample"):
            raise ValueError(f"scale, shift and posterior must be left out for the codec {self.kind}, which has none")
        if not abs(self.shift) < float("inf"):
            raise ValueError(f"shift must be finite, got {self.shift}")

    @property
    def description(self) -> dict[str, Any] | None:
        """What decides the latents of a data set, as plain JSON; None where they are the pixels themselves."""
        if self.kind == "identity":
            return None
        decides = ("kind", "image_size", "sha256", "scale", "shift", "posterior", "statistics_sha256")
        return {**{name: getattr(self, name) for name in decides}, "transform": "adm_centre_crop"}

    def _check_source(self, name: str, hash_name: str) -> None:
        path, digest = getattr(self, name), getattr(self, hash_name)
        if name not in _SOURCES[self.kind]:
            if path or digest:
                raise ValueError(f"{name} must be left out for the codec {self.kind}, got {path or digest!r}")
        elif not path and (self.kind, name) == ("vae", "decoder") and not digest:
            return  # the autoencoder itself decodes
        elif not path:
            raise ValueError(f"{name} must be given for the codec {self.kind}, got ''; name a path or URI")
        elif not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(
                f"{hash_name} must be 64 hexadecimal digits, got {digest!r}; 64 times 'f' makes the error name it"
            )


class Codec:
    """Pixels to what is stored, to what a network sees, to pixels: fp32, deterministic, without gradients.

    Batches are computed as they are given: the last bits of a result depend on the size of its batch, as everywhere.
    """

    def __init__(self, config: CodecConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        raise NotImplementedError

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, S, S), uint8, to what a data set stores, on the codec's device.

        The identity: the pixels; a vae: posterior mean and standard deviation, neither shifted nor scaled, float32
        (B, 2C, h, w), so that training can draw anew each time; rae: normalised latents, float32.
        """
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, C, S, S), uint8, on the codec's device."""
        raise NotImplementedError


def latent_shape_of(config: CodecConfig) -> tuple[int, int, int]:
    """Channels, height and width of the codec's latents, after opening it on the CPU; raises what open_codec raises."""
    return open_codec(config, torch.device("cpu")).latent_shape


def open_codec(config: CodecConfig, device: torch.device) -> Codec:
    """Loads what the codec needs, after checking its hashes.

    Raises:
        ValueError: a path is missing, has another hash than stated (the message has the one found), cannot be read, or
            does not fit the image size.
    """
    if config.kind == "identity":
        return IdentityCodec(config, device)
    _check_directory("weights", config.weights, config.sha256)
    return VaeCodec(config, device) if config.kind == "vae" else RaeCodec(config, device)


class IdentityCodec(Codec):
    """See Codec: the latent is the image, mapped to [-1, 1]."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See Codec."""
        return self.config.channels, self.config.image_size, self.config.image_size

    def encode(self, pixels: Tensor) -> Tensor:
        """See Codec."""
        return _checked(pixels, self.config).to(self.device)

    def decode(self, latent: Tensor) -> Tensor:
        """See Codec."""
        return quantise(latent.to(self.device), self.config.rounding)


class VaeCodec(Codec):
    """See Codec: a diffusers AutoencoderKL."""

    def __init__(self, config: CodecConfig, device: torch.device) -> None:
        super().__init__(config, device)
        with of_setting("weights"):
            self.vae: Any = load_vae(Path(config.weights)).to(device)
        _check_scaling("weights", config.weights, config)
        self.decoder: Any = self.vae
        if config.decoder:
            _check_directory("decoder", config.decoder, config.decoder_sha256)
            with of_setting("decoder"):
                self.decoder = load_vae(Path(config.decoder)).to(device)
            _check_scaling("decoder", config.decoder, config)
            mine, its = ((len(v.config.block_out_channels), v.config.latent_channels) for v in (self.vae, self.decoder))
            if mine != its:
                raise ValueError(f"decoder must have the (levels, latent channels) {mine} of weights, got {its}")
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if config.image_size % self.factor:
            raise ValueError(f"image_size must be a multiple of {self.factor} for this vae, got {config.image_size}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See Codec."""
        side = self.config.image_size // self.factor
        return self.vae.config.latent_channels, side, side

    def encode(self, pixels: Tensor) -> Tensor:
        """See Codec."""
        with exact(self.device):
            images = _checked(pixels, self.config).to(self.device).float() / 127.5 - 1
            posterior = self.vae.encode(images).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1)

    def decode(self, latent: Tensor) -> Tensor:
        """See Codec."""
        with exact(self.device):
            images = self.decoder.decode(latent.to(self.device).float() / self.config.scale + self.config.shift).sample
        return quantise(images, self.config.rounding)


def _check_scaling(name: str, directory: str, config: CodecConfig) -> None:
    """Compares with what the config.json states itself: older published ones state nothing, and a null shift is 0."""
    stated = read_json(Path(directory) / "config.json")
    for setting, key in (("scale", "scaling_factor"), ("shift", "shift_factor")):
        mine = getattr(config, setting)
        if (its := stated.get(key, mine) or 0.0) != mine:
            raise ValueError(
                f"{setting} must be {its}, the {key} in the config.json of {name} {directory}, got {mine}; set it, or "
                "give the autoencoder that was meant"
            )


class RaeCodec(Codec):
    """See Codec: patch tokens of DINOv2 without the last norm's affine part, normalised; and RAE's ViT decoder."""

    def __init__(self, config: CodecConfig, device: torch.device) -> None:
        super().__init__(config, device)
        decoder, statistics = Path(config.decoder), Path(config.statistics)
        _check_file("decoder", decoder, config.decoder_sha256)
        _check_file("statistics", statistics, config.statistics_sha256)
        with of_setting("weights"):
            self.encoder: Any = load_dinov2(Path(config.weights))
        self.encoder.layernorm = nn.LayerNorm(
            self.encoder.config.hidden_size, eps=self.encoder.config.layer_norm_eps, elementwise_affine=False
        )
        self.encoder.to(device)
        with of_setting("decoder"):
            self.decoder = load_rae_decoder(decoder, num_heads=config.decoder_heads).to(device)
        makes = (self.decoder.channels, self.decoder.grid, self.decoder.grid * self.decoder.patch_size)
        needs = (self.latent_shape[0], self.latent_shape[1], config.image_size)
        if makes != needs:
            raise ValueError(f"decoder must fit (channels, grid, image size) {needs}, got {makes}; set image_size")
        with of_setting("statistics"):
            self.mean, self.std = (value.to(device) for value in load_rae_statistics(statistics, self.latent_shape))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See Codec."""
        side = self.config.image_size // _RAE_PATCH
        return self.encoder.config.hidden_size, side, side

    def encode(self, pixels: Tensor) -> Tensor:
        """See Codec."""
        channels, side, _ = self.latent_shape
        with exact(self.device):
            images = _checked(pixels, self.config).to(self.device).float() / 255
            images = _resize(images, side * self.encoder.config.patch_size)
            mean, std = _imagenet(self.device)
            tokens = _patch_tokens(self.encoder, (images - mean) / std)
            z = tokens.transpose(1, 2).reshape(-1, channels, side, side)
            return (z - self.mean) / self.std

    def decode(self, latent: Tensor) -> Tensor:
        """See Codec."""
        with exact(self.device):
            mean, std = _imagenet(self.device)
            images = self.decoder(latent.to(self.device).float() * self.std + self.mean) * std + mean
        return quantise(images, self.config.rounding, unit=True)


# ------------------------------------------------------------------------------------------------------ features


def open_dinov2(weights: str, sha256: str, image_size: int, device: torch.device) -> nn.Module:
    """REPA's encoder: a DINOv2 whose table of positions is resampled once for images of this size.

    Resampling is bicubic with antialiasing, as published; the library's own, done in every call, has none for a DINOv2
    without registers.

    Raises:
        ValueError: the directory is missing, unreadable or of another hash, or image_size is no multiple of 16.
    """
    if image_size % _RAE_PATCH:
        raise ValueError(f"image_size must be a multiple of {_RAE_PATCH} for DINOv2's features, got {image_size}")
    _check_directory("weights", weights, sha256)
    encoder: Any = load_dinov2(Path(weights))
    table = encoder.embeddings.position_embeddings  # (1, 1 + tokens, D), the class token first
    side, grid = round((table.shape[1] - 1) ** 0.5), image_size // _RAE_PATCH
    squares = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resampled = functional.interpolate(squares, (grid, grid), mode="bicubic", antialias=True)
    table = torch.cat([table[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1)
    encoder.embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)
    return encoder.to(device)


def dino_width(weights: str, sha256: str, image_size: int) -> int:
    """The width of its tokens, after opening it on the CPU; raises what open_dinov2 raises."""
    encoder: Any = open_dinov2(weights, sha256, image_size, torch.device("cpu"))
    return int(encoder.config.hidden_size)


def dino_features(encoder: nn.Module, pixels: Tensor, size: int) -> Tensor:
    """REPA's target: the patch tokens after the final norm, float32 (B, T, D), row by row.

    Args:
        encoder: from `open_dinov2`.
        pixels: (B, 3, S, S), uint8.
        size: side that the encoder sees, a multiple of its patch: 224 for images of 256 px, 448 for 512.
    """
    device = next(encoder.parameters()).device
    with exact(device):
        mean, std = _imagenet(device)
        return _patch_tokens(encoder, _resize((pixels.to(device).float() / 255 - mean) / std, size))


def _patch_tokens(encoder: Any, images: Tensor) -> Tensor:
    """Tokens (B, T, D) after the final norm, without the class token and the registers."""
    return encoder(images).last_hidden_state[:, 1 + getattr(encoder.config, "num_register_tokens", 0) :]


def _resize(images: Tensor, size: int) -> Tensor:
    """Bicubic without antialiasing, as REPA and RAE do."""
    return functional.interpolate(images, (size, size), mode="bicubic", align_corners=False)


def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=device).view(2, 3, 1, 1)
    return mean, std


# -------------------------------------------------------------------------------------------------------- pixels


def quantise(images: Tensor, rounding: Rounding, *, unit: bool = False) -> Tensor:
    """Images to uint8, clamped; `unit`: their range is [0, 1] instead of [-1, 1]. See CodecConfig.rounding.

    Raises:
        FloatingPointError: a value is not finite; as pixels it would pass for black.
    """
    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        raise FloatingPointError(f"decoded images must be finite, but image {int(finite.int().argmin())} is not")
    if rounding == "half_up":
        values = images * 255 + 0.5 if unit else images * 127.5 + 128
    else:
        values = images * 255 if unit else (images + 1) * 127.5
    return (values.round() if rounding == "round" else values).clamp(0, 255).to(torch.uint8)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop, which SiT, REPA and RAE share: uint8 (3, size, size).

    Both sides are halved by a box filter while the shorter one is at least 2 * size; then bicubic, until the shorter
    one is size; then the middle, where an odd rest leaves the smaller margin above and on the left. Grey of 16 bits is
    rounded to 8 before.

    Raises:
        ValueError: the pixels are integers or numbers whose range nobody knows.
    """
    image = _of_eight_bits(image).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image)[top : top + size, left : left + size].transpose(2, 0, 1).copy()


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Where there are more, Pillow's own conversion would show everything beyond 255 as white."""
    # Pillow gives a 16-bit PGM as 32-bit integers from 0 to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels must be of 8 or 16 bits, got Pillow's mode {image.mode}")
    return image


def _checked(pixels: Tensor, config: CodecConfig) -> Tensor:
    wanted = (config.channels, config.image_size, config.image_size)
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != wanted:
        shape = ", ".join(map(str, wanted))
        raise ValueError(f"pixels must be torch.uint8 (B, {shape}), got {pixels.dtype} {tuple(pixels.shape)}")
    return pixels


# --------------------------------------------------------------------------------------------------------- files


def directory_hash(path: Path) -> str:
    r"""SHA-256 over the sorted `<sha256>  <relative name>` lines of what libraries read in a directory.

    That is *.json (configurations, tokenizers), *.safetensors (weights), *.txt and *.model (merges, vocabularies and
    pieces of tokenizers); pickled weights are never read. The same as, in the directory,
    `find * -type f | grep -E '\.(json|safetensors|txt|model)$' | LC_ALL=C sort | xargs sha256sum | sha256sum`.
    A process reads each file once, until its size or time of change is another: published text encoders are 19 GB.

    Raises:
        ValueError: there is no such file in it.
    """
    files = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.suffix in _HASHED_SUFFIXES and file.is_file()
    )
    if not files:
        raise ValueError(f"{path} must be a local directory with *.json and *.safetensors files, got none")
    lines = "".join(f"{_sha256(path / name)}  {name}\n" for name in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(file: Path) -> str:
    found = file.stat()
    if time.time_ns() - found.st_mtime_ns < SETTLED_NS:
        return measure(file).sha256
    return _remembered_sha256(file.absolute(), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _remembered_sha256(file: Path, size: int, changed_ns: int) -> str:
    return measure(file).sha256


@contextmanager
def of_setting(name: str) -> Iterator[None]:
    """Says of which setting a complaint is that names a path alone."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(name) else f"{name} {text}") from error


def _check_directory(name: str, path: str, sha256: str) -> None:
    with of_setting(name):
        found = directory_hash(Path(path))
    _check_hash(name, Path(path), found, sha256)


def _check_file(name: str, path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"{name} must be a local file, got {path}, which is none")
    _check_hash(name, path, measure(path).sha256, sha256)


def _check_hash(name: str, path: Path, found: str, stated: str) -> None:
    if found != stated:
        raise ValueError(f"{name} {path} must have the SHA-256 {stated}, got {found}; get the right files or state it")


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Full fp32 without gradients, whatever precision the surrounding loop set: cuDNN alone would use TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
