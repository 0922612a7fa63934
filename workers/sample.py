"""Samples as functions of the seed and the image's index, in fixed logical batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixflow_core.guidance import classifier_free
from mixflow_core.interpolant import Interpolant
from mixflow_core.loss import velocity_field
from mixflow_core.rng import generator
from mixflow_core.samplers import CountedField, Sampler
from workers.config import RunConfig
from workers.data import to_pixels


@dataclass(frozen=True)
class SampleSet:
    """What is sampled: with the weights it determines every bit.

    Attributes:
        sampler: method, steps and guidance.
        num_samples: images; image i has label i mod num_classes (the equal label law).
        batch_size: images of one network call; matrix products differ in the last bit between batch sizes, so it is
            part of the protocol.
        seed: of the starting noise and the SDE's noise, together with the image's index.
    """

    sampler: Sampler
    num_samples: int
    batch_size: int
    seed: int

    @property
    def num_batches(self) -> int:
        """Logical batches; the last may be smaller."""
        return -(-self.num_samples // self.batch_size)


class Samples(NamedTuple):
    """Pixels (B, C, H, W) uint8, labels (B,), and the network evaluations each of them took."""

    pixels: Tensor
    labels: Tensor
    nfe: int


@torch.no_grad()
def sample_batch(model: nn.Module, run: RunConfig, what: SampleSet, number: int, device: torch.device) -> Samples:
    """Logical batch `number` of a sample set: the same bits on whatever worker, in whatever order."""
    indices = range(number * what.batch_size, min((number + 1) * what.batch_size, what.num_samples))
    labels = torch.tensor([i % run.model.num_classes for i in indices])
    x0 = start_noise(run, what.seed, indices).to(device)
    sde_noise = [generator(what.seed, "sde_noise", i) for i in indices]

    def noise(step: int) -> Tensor:
        return torch.stack([torch.randn(x0.shape[1:], generator=g) for g in sde_noise]).to(device)

    field = sampling_field(model, run, labels.to(device), what.sampler.guidance_scale)
    x1 = what.sampler.run(field, x0, Interpolant(run.path), noise).cpu()
    finite = torch.isfinite(x1).flatten(1).all(1)
    if not finite.all():  # as pixels they would pass for black
        first = indices[int(finite.logical_not().nonzero()[0])]
        raise FloatingPointError(f"samples must be finite, but image {first} of {what.sampler.name} is not")
    return Samples(to_pixels(x1), labels, field.nfe)


def start_noise(run: RunConfig, seed: int, indices: range) -> Tensor:
    """x0 of these images, (B, C, H, W)."""
    shape = (run.model.in_channels, run.model.input_size, run.model.input_size)
    return torch.stack([torch.randn(shape, generator=generator(seed, "sample_noise", i)) for i in indices])


def sampling_field(model: nn.Module, run: RunConfig, y: Tensor, guidance_scale: float) -> CountedField:
    """The velocity that a sampler integrates, guided, counting its evaluations.

    Raises:
        ValueError: guidance was asked of a model that knows no null label.
    """
    null_label = run.model.null_label
    if guidance_scale != 1 and null_label is None:
        raise ValueError("guidance_scale must be 1 for a model with class_dropout_prob 0, which has no null label")
    guided = classifier_free(model, y, guidance_scale=guidance_scale, null_label=null_label or 0)
    field = velocity_field(guided, Interpolant(run.path), run.prediction)
    return CountedField(field, evaluations_per_call=1 if guidance_scale == 1 else 2)


def grid_png(pixels: Tensor, path: str, *, columns: int = 20, enlarge: int = 1) -> None:
    """Writes images (N, C, H, W) uint8, C in (1, 3), as one PNG, row by row."""
    from PIL import Image

    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = torch.zeros(rows * columns, channels, height, width, dtype=torch.uint8)
    canvas[:count] = pixels
    sheet = canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixel_rows = sheet.reshape(rows * height, columns * width, channels).numpy()
    image = Image.fromarray(pixel_rows[:, :, 0] if channels == 1 else pixel_rows)
    image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST).save(path)
