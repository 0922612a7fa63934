"""Distances against naive implementations, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from toys import normals, uniforms

from mixflow_core.metrics import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
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
    a, b = Moments.of(features(1, 12, d)).gaussian, Moments.of(features(2, 15, d)).gaussian
    # A small multiple of the identity makes them regular and moves the distance continuously.
    gap = []
    for eps in (1e-6, 1e-8):
        covariances = [g.covariance.numpy() + eps * np.eye(d) for g in (a, b)]
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


def rotated(seed, variances):
    """A covariance with these variances along axes that depend on the seed."""
    axes = np.linalg.qr(normals(seed, len(variances), len(variances)).numpy())[0]
    return torch.from_numpy(axes * variances @ axes.T)


def test_frechet_distance_keeps_its_digits_where_variances_differ_by_many_orders():
    """Two covariances with common axes have a known distance; features of a network are like that."""
    a, ratio = np.logspace(1, -12, 150), 1 + uniforms(5, 150).numpy()
    mean = torch.zeros(150)
    found = frechet_distance(Gaussian(mean, rotated(1, a)), Gaussian(mean, rotated(1, a * ratio)))
    assert found == pytest.approx(((np.sqrt(a * ratio) - np.sqrt(a)) ** 2).sum(), abs=1e-10)


def test_a_reference_of_mean_and_covariance_alone():
    a, b = Moments.of(features(1, 400, 8)), Moments.of(features(2, 300, 8, scale=1.4, shift=0.3))
    reference = Gaussian(b.mean.float(), b.covariance)  # published files have float32 means
    assert frechet_distance(a, reference) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert frechet_distance(a, Gaussian(b.mean, b.covariance)) == frechet_distance(a, b)
    assert reference.root is reference.root, "kept: a reference is compared with many samples"
    torch.testing.assert_close(reference.root @ reference.root.T, b.covariance)
    points = [Gaussian(torch.tensor([value]), torch.zeros(1, 1)) for value in (0.1, 0.3)]
    apart = float(np.float64(np.float32(0.3)) - np.float64(np.float32(0.1)))
    assert frechet_distance(*points) == pytest.approx(apart**2, rel=1e-12)


def test_fewer_features_than_dimensions_are_refused():
    d = 8
    enough, few = Moments.of(features(1, d + 1, d)), Moments.of(features(2, d, d))
    assert frechet_distance(enough, enough.gaussian) == pytest.approx(0, abs=1e-9)
    for pair in ((few, enough), (enough, few), (few, enough.gaussian)):
        with pytest.raises(ValueError, match="more than their dimension 8") as caught:
            frechet_distance(*pair)
        assert str(caught.value) == (
            "features must number more than their dimension 8 for a Frechet distance, got 8; take at least 9 images, "
            "better ten times as many"
        )


def test_what_is_no_gaussian_is_refused():
    mean, covariance = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"^covariance must have shape \(D, D\) for .*, got \(3, 4\), \(3,\)$"):
        Gaussian(mean, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"^covariance must have shape .*, got \(2, 2\), \(3,\)$"):
        Gaussian(mean, torch.eye(2))
    for bad in ((mean, covariance * math.nan), (mean + math.inf, covariance)):
        with pytest.raises(ValueError, match=r"^mean and covariance must be finite"):
            Gaussian(*bad)
    indefinite = Gaussian(mean, torch.tensor([1.0, 2.0, -0.5]).diag())
    with pytest.raises(ValueError, match=r"^covariance must have no negative eigenvalue, got -0\.5; take another"):
        frechet_distance(Gaussian(mean, covariance), indefinite)
    with pytest.raises(ValueError, match=r"^features must have one dimension, got 3 and 2; use one extractor$"):
        frechet_distance(Gaussian(mean, covariance), Gaussian(torch.zeros(2), torch.eye(2)))


# Inception Score


def naive_inception_score(logits, bounds):
    scores = []
    for low, high in bounds:
        rows = [[math.exp(value) for value in row] for row in logits[low:high]]
        p = [[value / sum(row) for value in row] for row in rows]
        mean = [sum(column) / len(p) for column in zip(*p, strict=True)]
        kl = [sum(x * math.log(x / y) for x, y in zip(row, mean, strict=True)) for row in p]
        scores.append(math.exp(sum(kl) / len(kl)))
    return np.mean(scores), np.std(scores)


def test_inception_score_is_the_published_formula():
    logits = 2 * normals(1, 11, 5)
    bounds = [(0, 2), (2, 5), (5, 8), (8, 11)]  # floor(i * 11 / 4)
    assert inception_score(logits, splits=4) == pytest.approx(naive_inception_score(logits.tolist(), bounds), rel=1e-12)
    tenths = [(i, i + 1) for i in range(10)]
    assert naive_inception_score(logits[:10].tolist(), tenths) == pytest.approx((1, 0))
    assert inception_score(logits[:10]) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_of_sure_and_of_undecided_classifiers():
    sure = 1000 * torch.eye(4).repeat(5, 1)
    assert inception_score(sure, splits=5) == pytest.approx((4, 0), abs=1e-12)
    assert inception_score(torch.zeros(20, 7), splits=2) == pytest.approx((1, 0), abs=1e-12)
    assert inception_score(sure[:2], splits=1) == pytest.approx((2, 0), abs=1e-12)  # two of the classes never come


@pytest.mark.parametrize("splits", [0, 8])
def test_more_splits_than_images_are_refused(splits):
    with pytest.raises(ValueError, match=rf"^splits must lie in \[1, 7\], the number of images, got {splits}; take"):
        inception_score(normals(1, 7, 3), splits=splits)


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
