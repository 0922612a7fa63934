"""Our formulae beside torch-fidelity's, on the same features in float64."""

from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from toys import normals

from mixflow_core.metrics import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

D = 256


def features(seed, n, shift=0.0):
    """Positive, correlated and of very different variances, as pooled activations are."""
    mix = normals(99, D, D) / D**0.5 * torch.logspace(0, -2, D, dtype=torch.float64)
    return (normals(seed, n, D) @ mix + shift + 0.5).relu()


REAL, GENERATED = features(1, 2200), features(2, 1500, shift=0.02)


def close(value):
    return pytest.approx(value, rel=1e-8)


def test_frechet_distance():
    statistics = [fid_features_to_statistics(x) for x in (GENERATED, REAL)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(GENERATED), Moments.of(REAL)) == close(expected)
    parts = [Moments.of(part) for part in GENERATED.split(700)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    reference = Gaussian(*(torch.from_numpy(statistics[1][key]) for key in ("mu", "sigma")))
    assert frechet_distance(merged, reference) == close(expected)


def test_kernel_distance_over_all_pairs_is_what_the_subsets_estimate():
    """One subset of everything is torch-fidelity's estimate without its noise."""
    everything = {"kid_subsets": 1, "kid_subset_size": 1500, "verbose": False}
    expected = kid_features_to_metric(GENERATED, REAL[:1500], **everything)["kernel_inception_distance_mean"]
    assert kernel_distance(GENERATED, REAL[:1500]) == close(expected)


@pytest.mark.parametrize("splits", [1, 10, 7])
def test_inception_score(splits):
    logits = 3 * normals(3, 1234, 1008)
    expected = isc_features_to_metric(logits, splits=splits, shuffle=False)
    mean, deviation = inception_score(logits, splits=splits)
    assert mean == close(expected["inception_score_mean"])
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("save_cpu_ram", [True, False])
def test_precision_and_recall(save_cpu_ram):
    # Few dimensions, or hardly any point lies in another's ball.
    real, generated = normals(4, 900, 6), 0.8 * normals(5, 700, 6) + 0.4
    expected = prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=250, save_cpu_ram=save_cpu_ram, verbose=False
    )
    precision, recall = precision_recall(real, generated, k=3)
    # torch-fidelity averages in float32: the numbers of points are what can be compared.
    assert precision == round(700 * expected["precision"]) / 700
    assert recall == round(900 * expected["recall"]) / 900
    assert 0.1 < recall < precision < 0.99
