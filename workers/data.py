"""Images with their labels in memory, and their batches in an order that is pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixflow_core.rng import generator, shard_position
from workers.config import RunConfig
from workers.models.sit import drop_labels

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


class CaptionTable(NamedTuple):
    """Text embeddings of captions, float16; the label of an image is its caption's row, the last row the empty one.

    Attributes:
        text: token embeddings (N + 1, L, D).
        pooled: pooled embeddings (N + 1, P).
        captions: the N captions and "".
    """

    text: np.ndarray
    pooled: np.ndarray
    captions: list[str]


class ImageSet(NamedTuple):
    """Images with labels, as pixels or as the latents of a codec.

    Attributes:
        images: (N, C, H, W): uint8 pixels, float latents, or posterior moments (mean and deviation, 2C channels).
        labels: (N,) int64: classes, or rows of `captions`.
        codec: what made the latents, as `codecs` describes it; None for pixels.
        features: alignment targets (N, T, D) float16, None without.
        pixels: the images behind the latents, (N, 3, S, S) uint8, None where they were not kept.
        captions: None for class labels.
    """

    images: np.ndarray
    labels: np.ndarray
    codec: Mapping[str, Any] | None = None
    features: np.ndarray | None = None
    pixels: np.ndarray | None = None
    captions: CaptionTable | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what a model sees."""
        channels, height, width = self.images.shape[1:]
        return (channels // 2 if self.has_posterior else channels, height, width)

    @property
    def has_posterior(self) -> bool:
        """Whether `images` are a posterior's moments, as a vae's are."""
        return self.codec is not None and self.codec["kind"] == "vae"

    @property
    def seen(self) -> np.ndarray:
        """The pixels, for what looks at images instead of latents.

        Raises:
            ValueError: they were not kept.
        """
        if self.codec is None:
            return self.images
        if self.pixels is None:
            raise ValueError("data must keep the pixels beside the latents for this; encode them with keep_pixels: all")
        return self.pixels

    def x1(self, rows: np.ndarray | slice, numbers: torch.Generator | None = None) -> Tensor:
        """What a model sees, float32, see `to_latent`; a posterior is taken at its mean without `numbers`."""
        stored = torch.from_numpy(np.require(self.images[rows], requirements="W"))
        if not self.has_posterior:
            return to_latent(self.codec, stored, None)
        shape = (len(stored), *self.shape)
        noise = torch.zeros(shape) if numbers is None else torch.randn(shape, generator=numbers)
        return to_latent(self.codec, stored, noise)

    def y(self, rows: np.ndarray | slice) -> Tensor:
        """Labels (B,)."""
        return torch.from_numpy(np.require(self.labels[rows], requirements="W"))

    def targets(self, rows: np.ndarray | slice) -> Tensor | None:
        """Alignment targets (B, T, D), float32; None without."""
        if self.features is None:
            return None
        return torch.from_numpy(np.require(self.features[rows], requirements="W")).float()


def to_latent(codec: Mapping[str, Any] | None, stored: Tensor, noise: Tensor | None) -> Tensor:
    """What a network trains on, of what a data set stores: arithmetic alone, without the codec's weights.

    Args:
        codec: what made the latents, None for pixels.
        stored: (B, ...), on any device.
        noise: standard normal (B, C, h, w), for a vae whose posterior is sampled; otherwise unused.

    Returns:
        float32 (B, C, h, w): pixels mapped to [-1, 1]; a vae's (mean + deviation noise - shift) scale, as SiT, REPA and
        SD3 train on; other latents as they are.

    Raises:
        ValueError: the noise is missing or has another shape than the latents.
    """
    if codec is None:
        return stored.float() / 127.5 - 1 if stored.dtype == torch.uint8 else stored.float()
    if codec["kind"] != "vae":
        return stored.float()
    mean, deviation = stored.float().chunk(2, 1)
    if codec["posterior"] == "mean":
        return (mean - codec["shift"]) * codec["scale"]
    if noise is None or noise.shape != mean.shape:
        got = None if noise is None else tuple(noise.shape)
        raise ValueError(f"noise must have the latents' shape {tuple(mean.shape)} for posterior sample, got {got}")
    return (mean + deviation * noise - codec["shift"]) * codec["scale"]


def to_pixels(x: Tensor) -> Tensor:
    """Inverse of ImageSet.x1 for pixels: round to nearest after clamping, uint8. Part of the protocol."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def slice_of(images: ImageSet, rows: slice) -> ImageSet:
    """The same set with these rows only."""
    return images._replace(
        images=images.images[rows],
        labels=images.labels[rows],
        features=None if images.features is None else images.features[rows],
        pixels=None if images.pixels is None else images.pixels[rows],
    )


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


class Batch(NamedTuple):
    """What one forward pass needs: data x1, labels y (already dropped), noise x0, uniforms u (B, 2) for (t, m).

    `features` are alignment targets (B, T, D), None where the run does not align. `more_noise` (B, ...) and `u_rollout`
    (B,) are what a TrainingCorrective draws, None without.
    """

    x1: Tensor
    y: Tensor
    x0: Tensor
    u: Tensor
    features: Tensor | None = None
    more_noise: Tensor | None = None
    u_rollout: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """A copy on a device; from pinned memory it does not wait."""
        if device.type == "cpu":
            return self
        moved: list[Any] = [None if v is None else v.pin_memory().to(device, non_blocking=True) for v in self]
        return Batch(*moved)


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
    x1 = data.x1(rows, generator(run.seed, "posterior", position) if data.has_posterior else None)
    u_drop = torch.rand(size, generator=generator(run.seed, "dropout", position))
    corrective, numbers = run.corrective, generator(run.seed, "corrective", position)
    return Batch(
        x1=x1,
        y=drop_labels(data.y(rows), u_drop, run.model),
        x0=torch.randn(x1.shape, generator=generator(run.seed, "noise", position)),
        u=torch.rand(size, 2, generator=generator(run.seed, "time", position)),
        features=data.targets(rows) if run.alignment_weight else None,
        more_noise=torch.randn(x1.shape, generator=numbers) if corrective.input_perturbation else None,
        u_rollout=torch.rand(size, generator=numbers) if corrective.rollout_share else None,
    )


def realised_times(run: RunConfig, *, most: int = 2048, bins: int = 40) -> dict[str, Any]:
    """Histograms over [0, 1] of t, m and t - m as the run drew them: of all its shards, or of `most` spread over it.

    Returns:
        Plain JSON: `edges` (bins + 1), the counts of `t`, `m` and `lag`, and `num_draws`.
    """
    training = run.training
    size, count = training.global_batch_size // training.num_shards, training.steps * training.num_shards
    positions = np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)).tolist()
    u = torch.cat([torch.rand(size, 2, generator=generator(run.seed, "time", position)) for position in positions])
    t, m = run.mixture.draw(u)
    counts = {
        name: torch.histc(values, bins, 0, 1).long().tolist() for name, values in (("t", t), ("m", m), ("lag", t - m))
    }
    return {"edges": [i / bins for i in range(bins + 1)], "num_draws": len(u), **counts}


def join(batches: list[Batch]) -> Batch:
    """Shards joined into one batch, in their order."""
    if len(batches) == 1:
        return batches[0]
    joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*batches, strict=True)]
    return Batch(*joined)
