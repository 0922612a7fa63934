"""Networks that turn images into the numbers which metrics compare, behind one interface; and CLIP's score."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from workers.codecs import IMAGENET_MEAN, IMAGENET_STD, directory_hash, exact
from workers.manifest import measure
from workers.pretrained import load_clip, load_dinov2

# Of the published FID-Inception, whose distances alone are called FID.
FID_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_DINO_SIZE = 224  # pixels that FD-DINOv2's encoder sees
# What an absent or another file is to be replaced with, and where people get it.
_SOURCES = {
    "inception": (
        "the file of the FID-Inception",
        "pt_inception-2015-12-05-6726825d.pth from the release fid_weights of github.com/mseitzer/pytorch-fid, or "
        "weights-inception-2015-12-05-6726825d.pth from v0.2.0 of github.com/toshas/torch-fidelity, the same bytes",
    ),
    "dinov2": ("a DINOv2 in transformers' layout", "huggingface.co/facebook/dinov2-large"),
    "clip": ("a CLIP in transformers' layout", "huggingface.co/openai/clip-vit-large-patch14"),
}


@dataclass(frozen=True)
class ExtractorConfig:
    """Which network sees the images: a part of the protocol of every number.

    Attributes:
        kind: `digits` (a classifier trained on the experiment's own images), `inception` (the FID-Inception), `dinov2`
            (FD-DINOv2's encoder) or `clip` (which scores images against their captions).
        weights: URI, left out for digits: of the file for inception, else of a directory in transformers' layout.
        sha256: of that file, which must be FID_INCEPTION, or directory_hash of that directory.
    """

    kind: Literal["digits", "inception", "dinov2", "clip"]
    weights: str = ""
    sha256: str = ""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when there is no path, the hash is none, or it is not the published FID-Inception's."""
        if self.kind == "digits":
            if self.weights or self.sha256:
                raise ValueError(f"weights must be left out for digits, which are trained here, got {self.weights!r}")
            return
        if not self.weights:
            what, where = _SOURCES[self.kind]
            raise ValueError(
                f"weights must be given for the extractor {self.kind}, got ''; name the path or URI of {what}: {where}"
            )
        if self.kind == "inception" and self.sha256 != FID_INCEPTION:
            raise ValueError(
                f"sha256 of inception must be {FID_INCEPTION}, got {self.sha256!r}; distances in the features of other "
                f"weights are no FID: get {_SOURCES['inception'][1]}"
            )
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"sha256 must be 64 hexadecimal digits, got {self.sha256!r}; 64 times 'f' makes the error name it"
            )


class Features(NamedTuple):
    """What an extractor says of images, float32, row by row.

    Attributes:
        pooled: (B, D), for Frechet and kernel distances, precision and recall.
        spatial: (B, S), sFID's, in the order row, column, channel; None where the extractor has none.
        logits: (B, K), the Inception Score's; None where the extractor has none.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor:
    """Images to features: fp32, deterministic, without gradients. Only the Inception's distances are called FID.

    Those of any other carry its name, as `fd_dinov2`. Batches are computed as they are given: the last bits of a
    feature depend on the size of its batch.
    """

    def __init__(self, config: ExtractorConfig, device: torch.device) -> None:
        self.name: str = config.kind
        self.identity, self.device = config.sha256, device

    @property
    def dimension(self) -> int:
        """D, the number of pooled features of an image."""
        raise NotImplementedError

    def extract(self, pixels: Tensor) -> Features:
        """Features of pixels (B, 3, H, W), uint8, on the extractor's device."""
        raise NotImplementedError


def open_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """Loads the network, after checking its hash.

    Raises:
        ValueError: the weights are absent (the message says where people get them), have another hash than stated (the
            message has the one found), or cannot be read.
    """
    _verify(config.kind, config.weights, config.sha256)
    return InceptionExtractor(config, device) if config.kind == "inception" else DinoExtractor(config, device)


def dimension_of(config: ExtractorConfig) -> int | None:
    """The number of features of a network, after opening it on the CPU; None of CLIP, which scores images.

    Raises:
        ValueError: see open_extractor.
    """
    device = torch.device("cpu")
    if config.kind == "clip":
        ClipScore(config.weights, config.sha256, device)
        return None
    return open_extractor(config, device).dimension


class InceptionExtractor(Extractor):
    """See Extractor: the FID-Inception, with all that FID, sFID and the Inception Score take."""

    def __init__(self, config: ExtractorConfig, device: torch.device) -> None:
        super().__init__(config, device)
        from workers.inception import load_inception

        self.net: nn.Module = load_inception(Path(config.weights)).eval().requires_grad_(False).to(device)

    @property
    def dimension(self) -> int:
        """See Extractor."""
        return 2048

    def extract(self, pixels: Tensor) -> Features:
        """See Extractor."""
        with exact(self.device):
            found = self.net(_checked(pixels).to(self.device))
        return Features(found.pooled, found.spatial, found.logits)


class DinoExtractor(Extractor):
    """See Extractor: the class token after the final norm, FD-DINOv2's (Stein et al. 2023) with facebook/dinov2-large.

    As in their code (layer6ai-labs/dgm-eval, models/dinov2.py) images become 224 x 224 by Pillow's bicubic, which is
    antialiased and rounds to bytes, whatever their own shape, and are normalised by ImageNet's mean and deviation. Its
    option `clean_resize`, off unless asked for, would keep the resized values unrounded.
    """

    def __init__(self, config: ExtractorConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.net: Any = load_dinov2(Path(config.weights))
        if getattr(self.net.config, "num_register_tokens", 0):
            raise ValueError(f"weights {config.weights} must hold a DINOv2 without registers, got one with them")
        embeddings = self.net.embeddings
        table = _positions(embeddings.position_embeddings, _DINO_SIZE // self.net.config.patch_size)
        embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)
        self.net.to(device)

    @property
    def dimension(self) -> int:
        """See Extractor."""
        return self.net.config.hidden_size

    def extract(self, pixels: Tensor) -> Features:
        """See Extractor."""
        images = _pillow_resize(_checked(pixels), _DINO_SIZE)
        with exact(self.device):
            mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=self.device).view(2, 3, 1, 1)
            return Features(self.net((images.to(self.device).float() / 255 - mean) / std).last_hidden_state[:, 0])


def _positions(table: Tensor, grid: int) -> Tensor:
    """DINOv2's table of positions (1, 1 + N, D), the class token first, for grid x grid patches.

    As DINOv2's own code does it for models without registers (facebookresearch/dinov2, interpolate_pos_encoding):
    bicubic without antialiasing, at the coordinates of a scale that is 0.1 patches too large. The library's own
    resampling, which would happen in every call, has no such offset.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    squares = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    resampled = functional.interpolate(squares, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1)


def _pillow_resize(pixels: Tensor, size: int) -> Tensor:
    images = (Image.fromarray(image) for image in pixels.cpu().permute(0, 2, 3, 1).numpy())
    resized = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images])
    return torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous()


class ClipScore:
    """How well images fit their captions, 100 max(cos, 0) of CLIP's embeddings, after Hessel et al. 2021.

    The scale 100 and the bare caption are the convention of text-to-image tables (torchmetrics' CLIPScore has it too).
    Hessel et al., who score captions, write 2.5 max(cos, 0) and put "A photo depicts" before each caption.

    Args:
        weights: local directory of a CLIPModel in transformers' layout with its tokenizer.json and
            preprocessor_config.json.
        sha256: its directory_hash.
        device: where to compute.

    Raises:
        ValueError: see open_extractor.
    """

    def __init__(self, weights: str, sha256: str, device: torch.device) -> None:
        _verify("clip", weights, sha256)
        self.identity, self.device = sha256, device
        self.clip = load_clip(Path(weights))
        self.clip.model.to(device)

    def score(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """Scores (B,) in [0, 100], float32, fp32, deterministic.

        Args:
            pixels: (B, 3, H, W), uint8.
            captions: one for each image.

        Raises:
            ValueError: their numbers differ, or a caption has more tokens than the CLIP has positions.
        """
        if len(captions) != len(_checked(pixels)):
            raise ValueError(f"captions must be one for each image, got {len(captions)} for {len(pixels)} images")
        with exact(self.device):
            images, texts = self.clip.embed_images(pixels), self.clip.embed_captions(captions)
            return 100 * functional.cosine_similarity(images, texts).clamp(min=0)


def _checked(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be torch.uint8 (B, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
    return pixels


def _verify(kind: str, weights: str, sha256: str) -> None:
    """Raises ValueError unless the weights are there and have this hash."""
    what, where = _SOURCES[kind]
    path = Path(weights)
    if not (path if kind == "inception" else path / "config.json").is_file():
        raise ValueError(f"weights must be {what} with the SHA-256 {sha256}, got {weights}, which is none; get {where}")
    found = measure(path).sha256 if kind == "inception" else directory_hash(path)
    if found != sha256:
        raise ValueError(f"weights {weights} must have the SHA-256 {sha256}, got {found}; get {where}, or state it")
