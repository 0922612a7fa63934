"""Distances between sets of features. Everything is computed in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D): all that a Frechet distance takes, and a published reference may say."""

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        """Raises ValueError when the shapes do not fit each other or a number is not finite."""
        shapes = tuple(self.mean.shape), tuple(self.covariance.shape)
        if self.mean.ndim != 1 or shapes[1] != shapes[0] * 2:
            raise ValueError(
                f"covariance must have shape (D, D) for a mean of shape (D,), got {shapes[1]}, {shapes[0]}"
            )
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("mean and covariance must be finite, got others; take sound features or another reference")

    @cached_property
    def root(self) -> Tensor:
        """A factor R (D, D) with R R^T the covariance, kept: a reference is compared with many samples.

        Raises:
            ValueError: the matrix is no covariance, because it has an eigenvalue that rounding does not explain.
        """
        covariance = self.covariance.double()
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not failed:
            return factor
        values, vectors = torch.linalg.eigh(covariance)  # singular, or no covariance
        if values[0] < -1e-5 * values[-1]:
            raise ValueError(f"covariance must have no negative eigenvalue, got {values[0]:g}; take another reference")
        # What eigh returns below zero is rounding. Large ones first, small eigenvalues of R^T A R keep their digits.
        return (vectors * values.clamp(min=0).sqrt()).flip(1)


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and sum of outer products of deviations (D, D): mergeable without loss of precision."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features (N, D)."""
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(features.shape[0], mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union (Chan, Golub and LeVeque 1983). Merge in a fixed order: the last bit depends on it."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D)."""
        return self.scatter / (self.count - 1)

    @cached_property
    def gaussian(self) -> Gaussian:
        """The Gaussian of this mean and covariance, whatever the count; kept."""
        return Gaussian(self.mean, self.covariance)


def frechet_distance(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), the squared Frechet distance of two Gaussians.

    Called FID only when the features are those of the FID-Inception. tr (A B)^(1/2) is the sum of the square roots of
    the eigenvalues of R^T A R with R R^T = B, a symmetric matrix: no complex numbers, and a reference's R is made once.

    Args:
        a: of the samples.
        b: of the reference, whose root is kept.

    Raises:
        ValueError: the dimensions differ, or Moments are of so few features (N <= D) that their covariance is singular
            whatever the distribution: the distance would measure the number of features. Who compares such sets all
            the same, at equal counts, gives their `gaussian`.
    """
    a, b = _full_rank(a), _full_rank(b)
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must have one dimension, got {len(a.mean)} and {len(b.mean)}; use one extractor")
    spread = a.covariance.double()
    eigenvalues = torch.linalg.eigvalsh(b.root.T @ spread @ b.root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()  # below zero there is only rounding
    between = (a.mean.double() - b.mean.double()).square().sum()
    return float(between + spread.trace() + b.covariance.double().trace() - 2 * cross)


def _full_rank(of: Moments | Gaussian) -> Gaussian:
    if isinstance(of, Gaussian):
        return of
    dimension = len(of.mean)
    if of.count <= dimension:
        raise ValueError(
            f"features must number more than their dimension {dimension} for a Frechet distance, got {of.count}; take "
            f"at least {dimension + 1} images, better ten times as many"
        )
    return of.gaussian


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016) of logits (N, K), without the last layer's bias as published.

    exp of the mean KL divergence between p(y | x) and its mean over the images of a split; the mean of that over
    consecutive splits of the images as they come, and its standard deviation (over the splits, not divided by n - 1).

    Args:
        logits: as the images were sampled: each split should have all classes.
        splits: how many, 10 as published (of 50,000 images).

    Raises:
        ValueError: there are fewer images than splits.
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"splits must lie in [1, {count}], the number of images, got {splits}; take more images")
    log_p = logits.double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * count // splits : (i + 1) * count // splits]
        log_mean = part.logsumexp(0) - math.log(len(part))
        scores.append(math.exp(float((part.exp() * (part - log_mean)).sum(1).mean())))
    return _mean_and_deviation(scores)


def kernel_distance(a: Tensor, b: Tensor, *, block: int = 1000) -> float:
    """KID: the unbiased squared MMD with kernel (x . y / D + 1)^3 over all pairs of features (N, D) and (M, D).

    The mean over random subsets, as published (Binkowski et al. 2018), estimates the same with more noise.
    """
    a, b = a.double(), b.double()

    def kernel_sum(x: Tensor, y: Tensor) -> float:
        rows = ((x[i : i + block] @ y.T / x.shape[1] + 1) ** 3 for i in range(0, len(x), block))
        return math.fsum(float(row.sum()) for row in rows)

    def diagonal(x: Tensor) -> float:
        return float(((x.square().sum(1) / x.shape[1] + 1) ** 3).sum())

    within_a = (kernel_sum(a, a) - diagonal(a)) / (len(a) * (len(a) - 1))
    within_b = (kernel_sum(b, b) - diagonal(b)) / (len(b) * (len(b) - 1))
    return within_a + within_b - 2 * kernel_sum(a, b) / (len(a) * len(b))


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3, block: int = 2500) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (M, D).

    Precision: the share of generated features within the k-th-neighbour ball of some real one; recall: the reverse.
    """
    real, generated = real.double(), generated.double()
    balls, own_balls = _radii(real, k, block), _radii(generated, k, block)
    near_real, near_generated = [], torch.zeros_like(balls, dtype=torch.bool)
    for points, radii in zip(generated.split(block), own_balls.split(block), strict=True):
        distances = torch.cdist(points, real)
        near_real.append((distances <= balls).any(1))
        near_generated |= (distances <= radii[:, None]).any(0)
    return float(torch.cat(near_real).double().mean()), float(near_generated.double().mean())


def _radii(points: Tensor, k: int, block: int) -> Tensor:
    """Each point's distance to its k-th neighbour."""
    # The nearest of all is the point itself, at distance 0: hence k + 1.
    nearest = [torch.cdist(rows, points).topk(k + 1, dim=1, largest=False).values for rows in points.split(block)]
    return torch.cat(nearest)[:, k]
