"""Distances between sets of features, and paired intervals. Everything is computed in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
    def root(self) -> Tensor:
        """The covariance's symmetric square root (D, D), kept: a reference is compared with many samples."""
        values, vectors = torch.linalg.eigh(self.covariance)
        # A covariance has no negative eigenvalue; what eigh returns below zero is rounding.
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), the squared Frechet distance of two Gaussians.

    Called FID only when the features are those of the FID-Inception. tr (A B)^(1/2) is the sum of the singular values
    of A^(1/2) B^(1/2), which needs no clipping of imaginary parts for singular covariances.
    """
    cross = torch.linalg.svdvals(a.root @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return float(distance)


def kernel_distance(a: Tensor, b: Tensor, *, block: int = 1000) -> float:
    """KID: the unbiased squared MMD with kernel (x . y / D + 1)^3 over all pairs of features (N, D) and (M, D)."""
    a, b = a.double(), b.double()

    def kernel_sum(x: Tensor, y: Tensor) -> float:
        rows = ((x[i : i + block] @ y.T / x.shape[1] + 1) ** 3 for i in range(0, len(x), block))
        return math.fsum(float(row.sum()) for row in rows)

    def diagonal(x: Tensor) -> float:
        return float(((x.square().sum(1) / x.shape[1] + 1) ** 3).sum())

    within_a = (kernel_sum(a, a) - diagonal(a)) / (len(a) * (len(a) - 1))
    within_b = (kernel_sum(b, b) - diagonal(b)) / (len(b) * (len(b) - 1))
    return within_a + within_b - 2 * kernel_sum(a, b) / (len(a) * len(b))


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3, block: int = 1000) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (M, D).

    Precision: the share of generated features within the k-th-neighbour ball of some real one; recall: the reverse.
    """
    real, generated = real.double(), generated.double()
    return _coverage(real, generated, k, block), _coverage(generated, real, k, block)


def _coverage(support: Tensor, points: Tensor, k: int, block: int) -> float:
    radii = torch.cat(
        # The nearest neighbour of a support point is itself, at distance 0: hence k + 1.
        [torch.cdist(rows, support).kthvalue(k + 1, dim=1).values for rows in support.split(block)]
    )
    inside = [(torch.cdist(rows, support) <= radii).any(1) for rows in points.split(block)]
    return float(torch.cat(inside).double().mean())


@dataclass(frozen=True)
class Interval:
    """A mean over n pairs with its confidence interval [low, high]; sd is the standard deviation over the pairs."""

    mean: float
    low: float
    high: float
    sd: float
    n: int


def student_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values, for instance paired differences between two arms.

    Raises:
        ValueError: fewer than two values, from which no interval can be computed.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"values must number at least 2 for an interval, got {n}; run more replicates")
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_quantile((1 + confidence) / 2, n - 1) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def paired_interval(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of a[k] - b[k], where k is the replicate that both share."""
    return student_interval([x - y for x, y in zip(a, b, strict=True)], confidence=confidence)


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t with integer degrees of freedom, probability in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def student_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t, t >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for i in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    within = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return (1 + within) / 2
