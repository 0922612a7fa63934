"""Distances against naive implementations, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from toys import normals

from mixflow_core.metrics import (
    Moments,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def features(seed, n, d, scale=1.0, shift=0.0):
    return normals(seed, n, d) @ (torch.eye(d, dtype=torch.float64) + 0.3 * normals(99, d, d)) * scale + shift


# Moments


def test_merged_moments_are_those_of_the_union():
    x = features(1, 500, 6, shift=1e3)
    parts = [Moments.of(part) for part in x.split([1, 149, 300, 50])]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.count == 500
    np.testing.assert_allclose(merged.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(x.numpy().T), rtol=1e-9, atol=1e-9)
    centred = features(1, 500, 6)
    merged = Moments.of(centred[:123]).merge(Moments.of(centred[123:]))
    np.testing.assert_allclose(merged.covariance, np.cov(centred.numpy().T), rtol=1e-12, atol=1e-12)


def test_moments_of_float32_features_are_taken_in_float64():
    x = (features(2, 2000, 3) + 1000).float()
    np.testing.assert_allclose(Moments.of(x).covariance, np.cov(x.double().numpy().T), rtol=1e-10)


# Frechet distance


def exact_moments(mean, covariance, count=100):
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    return Moments(count, torch.as_tensor(mean, dtype=torch.float64), covariance * (count - 1))


def test_frechet_distance_is_the_published_formula():
    a, b = Moments.of(features(1, 400, 8)), Moments.of(features(2, 300, 8, scale=1.4, shift=0.3))
    product = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = (
        float(((a.mean - b.mean) ** 2).sum() + (a.covariance + b.covariance).trace()) - 2 * np.trace(product).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_diagonal_gaussians_is_known():
    sd_a, sd_b, mean_a, mean_b = np.array([1, 2, 0.5]), np.array([3, 1, 0.0]), np.array([0, 1, 2]), np.array([1, 1, 0])
    distance = frechet_distance(exact_moments(mean_a, np.diag(sd_a**2)), exact_moments(mean_b, np.diag(sd_b**2)))
    assert distance == pytest.approx(((mean_a - mean_b) ** 2).sum() + ((sd_a - sd_b) ** 2).sum(), rel=1e-12)


def test_frechet_distance_of_equal_sets_is_zero():
    a = Moments.of(features(1, 400, 8))
    assert abs(frechet_distance(a, a)) < 1e-9


def test_frechet_distance_of_singular_covariances():
    d = 40
    a, b = Moments.of(features(1, 12, d)), Moments.of(features(2, 15, d))
    # A small multiple of the identity makes them regular and moves the distance continuously.
    gap = []
    for eps in (1e-6, 1e-8):
        covariances = [m.covariance.numpy() + eps * np.eye(d) for m in (a, b)]
        cross = np.trace(linalg.sqrtm(covariances[0] @ covariances[1])).real
        expected = float((a.mean - b.mean).square().sum()) + sum(np.trace(c) for c in covariances) - 2 * cross
        gap.append(abs(frechet_distance(a, b) - expected))
    assert gap[1] < gap[0] < 0.1
    assert gap[1] < 0.01
    assert abs(frechet_distance(a, a)) < 1e-6
    # Within a common subspace it is the distance of the projections.
    flat = torch.zeros(50, 5, dtype=torch.float64)
    x, y = flat.clone(), flat.clone()
    x[:, :2], y[:, :2] = features(3, 50, 2), features(4, 50, 2)
    in_plane = frechet_distance(Moments.of(x[:, :2]), Moments.of(y[:, :2]))
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(in_plane, rel=1e-9)


# Kernel distance, precision and recall


def naive_kernel_distance(a, b):
    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def mean(values):
        return math.fsum(values) / len(values)

    a, b = a.tolist(), b.tolist()
    within = [mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return within[0] + within[1] - 2 * mean([kernel(x, y) for x in a for y in b])


@pytest.mark.parametrize("block", [7, 1000])
def test_kernel_distance_is_the_mean_over_pairs(block):
    a, b = features(1, 30, 4), features(2, 23, 4, shift=0.5)
    assert kernel_distance(a, b, block=block) == pytest.approx(naive_kernel_distance(a, b), rel=1e-10)


def test_kernel_distance_is_unbiased():
    values = [kernel_distance(normals(2 * k, 20, 3), normals(2 * k + 1, 20, 3)) for k in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(400)
    assert min(values) < 0


def naive_coverage(support, points, k):
    radii = [sorted(math.dist(a, b) for j, b in enumerate(support) if j != i)[k - 1] for i, a in enumerate(support)]
    return np.mean([any(math.dist(p, s) <= r for s, r in zip(support, radii, strict=True)) for p in points])


@pytest.mark.parametrize("block", [16, 1000])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_the_definitions(k, block):
    real, generated = features(1, 60, 3), features(2, 45, 3, shift=1.5)
    precision, recall = precision_recall(real, generated, k=k, block=block)
    assert precision == naive_coverage(real.tolist(), generated.tolist(), k)
    assert recall == naive_coverage(generated.tolist(), real.tolist(), k)
    assert 0 < recall < 1
    assert 0 < precision < 1


def test_a_narrow_generator_is_precise_and_recalls_little():
    real, generated = normals(1, 200, 2), 0.1 * normals(2, 200, 2)
    precision, recall = precision_recall(real, generated)
    assert precision > 0.95
    assert recall < 0.3
    assert precision_recall(real, real) == (1.0, 1.0)
