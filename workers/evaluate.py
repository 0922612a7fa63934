"""What is measured of images: their features in the order of the images, a reference, and the metrics between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixflow_core.metrics import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from mixflow_core.rng import generator
from mixflow_core.statistics import bootstrap_sd
from workers.extractors import Extractor

BATCH = 50  # images of one call of an extractor, part of the protocol: it decides the last bits
PATCH = 8  # side of the patches of fd_patches, in pixels
RESAMPLES = 20  # of the bootstrap within a seed
NEIGHBOURS = 3  # of precision and recall, as ADM's evaluator takes them
SPLITS = 10  # of the Inception score, as published
# What a metric's value depends on besides its images and extractor.
ESTIMATORS = {
    "kid": "unbiased, all pairs",
    "precision_recall_neighbours": NEIGHBOURS,
    "inception_score_splits": SPLITS,
    "patch_pixels": PATCH,
}
PUBLISHED = {
    "frechet": "fid",
    "spatial": "sfid",
    "score": "inception_score",
    "kernel": "kid",
    "precision": "precision",
    "recall": "recall",
}


def metric_names(kind: str) -> dict[str, str]:
    """What the numbers of an extractor are called: `frechet`, `kernel`, ... -> metric.

    Only the FID-Inception's have the published names; those of any other carry the extractor's.
    """
    if kind == "clip":
        return {"score": "clip_score"}
    if kind == "inception":
        return PUBLISHED
    own = {"frechet": "fd", "kernel": "kid", "precision": "precision", "recall": "recall"}
    return {what: f"{stem}_{kind}" for what, stem in own.items()}


def metrics_of(kinds: Sequence[str]) -> list[str]:
    """All metrics of an experiment with these extractors."""
    return [*(name for kind in kinds for name in metric_names(kind).values()), "fd_patches"]


# ------------------------------------------------------------------------------------------------------ a set of images


@dataclass(frozen=True)
class Measured:
    """What metrics read of a set of images in one extractor's space; parts join in the order of their images.

    Attributes:
        pooled: features (N, D), float32, on the CPU.
        spatial: moments of sFID's features; None where the extractor has none.
        logits: (N, K), float32, on the CPU; None where it has none.
    """

    pooled: Tensor
    spatial: Moments | None = None
    logits: Tensor | None = None

    @classmethod
    def of(cls, extractor: Extractor, pixels: Tensor) -> Measured:
        """Features of uint8 pixels (N, C, H, W), in fixed batches."""
        return cls.join([cls._of_batch(extractor, batch) for batch in pixels.split(BATCH)])

    @classmethod
    def _of_batch(cls, extractor: Extractor, pixels: Tensor) -> Measured:
        found = extractor.extract(pixels)
        spatial = None if found.spatial is None else _on_cpu(Moments.of(found.spatial))
        return cls(found.pooled.cpu(), spatial, None if found.logits is None else found.logits.cpu())

    @classmethod
    def join(cls, parts: Sequence[Measured]) -> Measured:
        """The parts as one set, in their order: the last bits of merged moments depend on it."""
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(
            torch.cat([part.pooled for part in parts]),
            merged(part.spatial for part in parts),
            torch.cat(logits) if logits else None,
        )


def patch_moments(pixels: Tensor) -> Moments:
    """Moments of patches of 8 x 8 pixels, scaled to [-1, 1], that cover uint8 pixels (N, C, S, S) at full resolution.

    Distances between them see residual noise, which features of images brought down to an extractor's size may miss.
    Where the side is no multiple of 8, the last patches overlap those before them.
    """
    parts = []
    for batch in pixels.split(BATCH):
        values = batch.double() / 127.5 - 1
        whole = values.shape[-1]
        side = min(PATCH, whole)
        starts = [*range(0, whole - side, side), whole - side]
        patches = values.unfold(2, side, 1)[:, :, starts].unfold(3, side, 1)[:, :, :, starts]
        parts.append(Moments.of(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)))
    return reduce(Moments.merge, parts)


def merged(parts: Iterable[Moments | None]) -> Moments | None:
    """Moments of the union, merged in their order; None where there are none."""
    there = [part for part in parts if part is not None]
    return reduce(Moments.merge, there) if there else None


def _on_cpu(moments: Moments) -> Moments:
    return Moments(moments.count, moments.mean.cpu(), moments.scatter.cpu())


# ---------------------------------------------------------------------------------------------------------- references


@dataclass(frozen=True)
class Reference:
    """What samples are compared with in one extractor's space.

    Attributes:
        gaussian: mean and covariance of its features.
        spatial: the same of sFID's; None without.
        features: (M, D) for kernel distance, precision and recall; None where only statistics are known.
    """

    gaussian: Gaussian
    spatial: Gaussian | None = None
    features: Tensor | None = None

    @classmethod
    def of(cls, measured: Measured) -> Reference:
        """Of a set of images."""
        spatial = measured.spatial.gaussian if measured.spatial else None
        return cls(Moments.of(measured.pooled).gaussian, spatial, measured.pooled)

    def save(self, path: Path) -> None:
        """Writes it as safetensors."""
        tensors = {"mean": self.gaussian.mean, "covariance": self.gaussian.covariance}
        if self.spatial:
            tensors |= {"spatial_mean": self.spatial.mean, "spatial_covariance": self.spatial.covariance}
        if self.features is not None:
            tensors["features"] = self.features
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Reads what `save` wrote."""
        found = load_file(path)
        spatial = Gaussian(found["spatial_mean"], found["spatial_covariance"]) if "spatial_mean" in found else None
        return cls(Gaussian(found["mean"], found["covariance"]), spatial, found.get("features"))

    def to(self, device: torch.device) -> Reference:
        """A copy on a device, where distances are computed."""
        return Reference(
            _moved(self.gaussian, device),
            _moved(self.spatial, device) if self.spatial else None,
            None if self.features is None else self.features.to(device),
        )


def _moved(gaussian: Gaussian, device: torch.device) -> Gaussian:
    return Gaussian(gaussian.mean.to(device), gaussian.covariance.to(device))


# --------------------------------------------------------------------------------------------------------------- scores


def score(
    kind: str, found: Measured, reference: Reference, device: torch.device, classes: Tensor | None = None
) -> dict[str, Any]:
    """Every metric of a sample set that its features and the reference allow.

    Args:
        kind: of the extractor.
        found: the samples.
        reference: what they are compared with, on `device`.
        device: where distances are computed, in float64.
        classes: labels (N,) where their numbers are fixed (label law `equal`): images are then resampled within their
            class. None: labels are as random as the images.

    Returns:
        Metric -> value; `within`: metric -> standard deviation over resampled images, the variation within a seed,
        empty where every image has a class of its own; `by_count`: metric -> number of images -> value of the first
        so many; and `step`: metric -> 1 / N where it is a share of N images.

    Raises:
        ValueError: too few images for a covariance.
    """
    names, features = metric_names(kind), found.pooled.to(device)
    scores = {name: measure() for name, measure in _measures(kind, found, reference, device).items()}

    def distance_of(rows: Tensor) -> float:
        return frechet_distance(Moments.of(features[rows]).gaussian, reference.gaussian)

    count, name = len(features), names["frechet"]
    within = {}
    if classes is None or len(classes.unique()) < count:
        numbers = generator(0, "eval", 2)
        within[name] = bootstrap_sd(distance_of, count, resamples=RESAMPLES, numbers=numbers, groups=classes)
    counts = [n for n in (count // 4, count // 2, count) if n > features.shape[1]]
    by_count = {str(n): frechet_distance(Moments.of(features[:n]), reference.gaussian) for n in counts}
    step = {}
    if reference.features is not None:
        step = {names["precision"]: 1 / count, names["recall"]: 1 / len(reference.features)}
    return {**scores, "within": within, "by_count": {name: by_count}, "step": step}


def one_score(metric: str, kind: str, found: Measured, reference: Reference, device: torch.device) -> float:
    """One of the metrics that `score` gives, with the same bits, without the others."""
    return _measures(kind, found, reference, device)[metric]()


def _measures(kind: str, found: Measured, reference: Reference, device: torch.device) -> dict[str, Callable[[], float]]:
    """How each metric is measured that the features and the reference allow."""
    names, features = metric_names(kind), found.pooled.to(device)
    measures = {names["frechet"]: lambda: frechet_distance(Moments.of(features), reference.gaussian)}
    if (mine := found.spatial) and (its := reference.spatial):
        spatial = Moments(mine.count, mine.mean.to(device), mine.scatter.to(device))
        measures[names["spatial"]] = lambda: frechet_distance(spatial, its)
    if (logits := found.logits) is not None:
        measures[names["score"]] = lambda: inception_score(logits, splits=SPLITS)[0]
    if (known := reference.features) is not None:
        both = lru_cache(lambda: precision_recall(known, features, k=NEIGHBOURS))
        measures[names["kernel"]] = lambda: kernel_distance(features, known)
        measures[names["precision"]] = lambda: both()[0]
        measures[names["recall"]] = lambda: both()[1]
    return measures


def join_scores(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of several extractors as one cell."""
    cell: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            cell[name] = {**cell.get(name, {}), **value} if isinstance(value, Mapping) else value
    return cell
