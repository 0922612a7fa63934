"""Distances between sets of features. Everything is computed in float64."""

from __future__ import annotations

import math
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
