"""Samples as functions of the seed and the image's index, in fixed logical batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from mixflow_core.correctives import SamplingCorrective
from mixflow_core.guidance import ConditionalModel, autoguided, classifier_free
from mixflow_core.interpolant import Interpolant
from mixflow_core.loss import velocity_field
from mixflow_core.rng import generator
from mixflow_core.samplers import CountedField, Field, Sampler
from workers.columns import as_column, describe_column, from_column, read_about, write_table
from workers.config import RunConfig
from workers.data import to_pixels
from workers.disk import is_the_disks

LabelLaw = Literal["equal", "random"]
LABEL_LAWS: dict[LabelLaw, str] = {
    "equal": "equal (image i has class i mod number of classes)",
    "random": "random (uniform and independent, by image index)",
}
# Most images and most bytes of pixels in a part: what a worker writes at once, and keeps if it is killed.
PART_IMAGES, PART_BYTES = 1000, 64 * 2**20
UNCORRECTED = SamplingCorrective()


@dataclass(frozen=True)
class SampleSet:
    """What is sampled: with the weights it determines every bit.

    Attributes:
        sampler: method, steps and guidance.
        num_samples: images.
        batch_size: images of one network call; matrix products differ in the last bit between batch sizes, so it is
            part of the protocol.
        seed: of the starting noise, the SDE's noise and random labels, together with the image's index.
        label_law: see LABEL_LAWS.
        corrective: remedies for exposure bias in sampling; the defaults are none.
    """

    sampler: Sampler
    num_samples: int
    batch_size: int
    seed: int
    label_law: LabelLaw = "equal"
    corrective: SamplingCorrective = UNCORRECTED

    @property
    def num_batches(self) -> int:
        """Logical batches; the last may be smaller."""
        return -(-self.num_samples // self.batch_size)

    def indices(self, number: int) -> range:
        """The images of logical batch `number`."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.num_samples))

    def parts(self, image_bytes: int) -> list[range]:
        """Logical batches by part, for images of so many bytes: the same whatever the number of workers."""
        batches = max(1, min(PART_IMAGES // self.batch_size, PART_BYTES // (image_bytes * self.batch_size)))
        return [range(n, min(n + batches, self.num_batches)) for n in range(0, self.num_batches, batches)]

    def num_images(self, batches: range) -> int:
        """Images of a part."""
        return min(batches.stop * self.batch_size, self.num_samples) - batches.start * self.batch_size

    def labels(self, indices: range, num_classes: int) -> Tensor:
        """Labels (B,) of these images."""
        if self.label_law == "equal":
            return torch.tensor([i % num_classes for i in indices])
        drawn = (torch.randint(num_classes, (1,), generator=generator(self.seed, "sample_label", i)) for i in indices)
        return torch.cat(list(drawn))


def sample_sets(settings: Mapping[str, Any]) -> list[SampleSet]:
    """The sample sets of a stage's settings, which are plain JSON: one for each of its `samplers`."""
    corrective = SamplingCorrective(**settings["corrective"])
    others = {key: settings[key] for key in ("num_samples", "batch_size", "seed", "label_law")}
    return [SampleSet(sampler=sampler, corrective=corrective, **others) for sampler in samplers_of(settings)]


def samplers_of(settings: Mapping[str, Any]) -> list[Sampler]:
    """The samplers of a stage's settings, in which tuples are lists."""
    return [Sampler(**{**s, "guidance_interval": tuple(s["guidance_interval"])}) for s in settings["samplers"]]


class Samples(NamedTuple):
    """Pixels (B, C, H, W) uint8, labels (B,), and the network evaluations each of them took."""

    pixels: Tensor
    labels: Tensor
    nfe: int


@torch.no_grad()
def sample_batch(
    model: nn.Module,
    run: RunConfig,
    what: SampleSet,
    number: int,
    device: torch.device,
    *,
    guide: nn.Module | None = None,
    decode: Callable[[Tensor], Tensor] = to_pixels,
) -> Samples:
    """Logical batch `number` of a sample set: the same bits on whatever worker, in whatever order.

    Args:
        model: (x, t, y) -> prediction.
        run: its configuration.
        what: the sample set.
        number: in [0, what.num_batches).
        device: where to compute.
        guide: the weaker model of autoguidance.
        decode: samples (B, C, H, W) on the CPU -> uint8 pixels; a codec's for latents.
    """
    indices = what.indices(number)
    labels = what.labels(indices, run.model.num_classes)
    x0 = start_noise(run, what.seed, indices).to(device)
    sde_noise = [generator(what.seed, "sde_noise", i) for i in indices]

    def noise(step: int) -> Tensor:
        return torch.stack([torch.randn(x0.shape[1:], generator=g) for g in sde_noise]).to(device)

    counted = [CountedField(network, len(labels)) for network in (model, guide) if network is not None]
    field = sampling_field(counted[0], run, labels.to(device), what.sampler, counted[-1] if guide else None)
    interpolant = Interpolant(run.path)
    x1 = what.sampler.run(what.corrective.wrap(field, interpolant, what.sampler), x0, interpolant, noise).cpu()
    finite = torch.isfinite(x1).flatten(1).all(1)
    if not finite.all():  # as pixels they would pass for black
        first = indices[int(finite.logical_not().nonzero()[0])]
        raise FloatingPointError(f"samples must be finite, but image {first} of {what.sampler.name} is not")
    return Samples(decode(x1), labels, sum(network.nfe for network in counted))


def start_noise(run: RunConfig, seed: int, indices: range) -> Tensor:
    """x0 of these images, (B, C, H, W)."""
    shape = (run.model.in_channels, run.model.input_size, run.model.input_size)
    return torch.stack([torch.randn(shape, generator=generator(seed, "sample_noise", i)) for i in indices])


def sampling_field(
    model: ConditionalModel,
    run: RunConfig,
    y: Tensor,
    sampler: Sampler | None = None,
    guide: ConditionalModel | None = None,
) -> Field:
    """The velocity that a sampler integrates, guided as it says; unguided without one.

    Raises:
        ValueError: guidance was asked of a model that knows no null label, or autoguidance without a guide.
    """
    null_label = run.model.null_label
    guided: Field
    if sampler is None or sampler.guidance_scale == 1:
        guided = partial(_with_labels, model, y)
    elif sampler.guidance == "autoguidance":
        if guide is None:
            raise ValueError("guidance must be classifier_free where the experiment gives no guide; add guide")
        interval = sampler.open_guidance_interval
        guided = autoguided(model, guide, y, guidance_scale=sampler.guidance_scale, interval=interval)
    else:
        if null_label is None:
            raise ValueError("guidance_scale must be 1 for a model with class_dropout_prob 0, which has no null label")
        guided = classifier_free(
            model,
            y,
            guidance_scale=sampler.guidance_scale,
            null_label=null_label,
            num_channels=sampler.guidance_channels or None,
            interval=sampler.open_guidance_interval,
        )
    return velocity_field(guided, Interpolant(run.path), run.prediction)


def _with_labels(model: ConditionalModel, y: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return model(x, t, y)


def write_part(path: Path, pixels: Tensor, labels: Tensor) -> None:
    """Writes a part as Parquet, whose bytes depend on its content alone: columns `image` and `label`."""
    columns = {"image": as_column(pixels.numpy()), "label": pa.array(labels.numpy())}
    write_table(columns, path, {"mixflow": json.dumps(describe_column(pixels.numpy()))})


def read_part(path: Path | IO[bytes]) -> tuple[Tensor, Tensor]:
    """Pixels (N, C, H, W) uint8 and labels (N,) of a part.

    Raises:
        ValueError: it is no part of samples, or damaged.
    """
    try:
        table = pq.read_table(path)
        pixels = from_column(table, "image", read_about(table))
        labels = np.require(table["label"].to_numpy(), np.int64, "W")
        return torch.from_numpy(np.require(pixels, np.uint8, "W")), torch.from_numpy(labels)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        if is_the_disks(error):
            raise
        raise ValueError(f"samples {path} must be a Parquet file of images and labels; {error}") from error


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
