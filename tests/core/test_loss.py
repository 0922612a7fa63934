"""The losses by their definitions, sample by sample; the published numbers are in workers/test_sit_golden.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import PATHS, normals, path_coefficients, uniforms

from mixflow_core.interpolant import Interpolant
from mixflow_core.loss import alignment_loss, per_sample_loss, times_defined, velocity_field
from mixflow_core.mixture import SlowedMixture

SHAPE = (16, 2, 3, 3)
X0, X1, OUT = normals(1, *SHAPE), normals(2, *SHAPE), normals(3, *SHAPE)


def slowed(path, target_time="m"):
    mixture = SlowedMixture(time_law="uniform", slowing_law="interval", gamma=0.8, target_time=target_time)
    return mixture.pair(Interpolant(path), mixture.draw(0.1 + 0.8 * uniforms(4, 16, 2)), x0=X0, x1=X1)


@pytest.mark.parametrize("target_time", ["m", "t"])
@pytest.mark.parametrize("weighting", ["none", "velocity", "likelihood"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("path", PATHS)
def test_loss_is_its_definition(path, prediction, weighting, target_time):
    if weighting != "none" and prediction in ("velocity", "data"):
        with pytest.raises(
            ValueError, match=f"weighting must be 'none' for {prediction} prediction, got '{weighting}'"
        ):
            per_sample_loss(lambda x, t: x, slowed(path), Interpolant(path), prediction=prediction, weighting=weighting)
        return
    pair = slowed(path, target_time)
    told = []

    def model(x, t):
        told.append((x, t))
        return OUT

    loss = per_sample_loss(model, pair, Interpolant(path), prediction=prediction, weighting=weighting)
    ((x, t),) = told
    assert torch.equal(x, pair.x_m)
    assert torch.equal(t, pair.t)
    at = (pair.m if target_time == "m" else pair.t).numpy()
    for i in range(len(at)):
        alpha, sigma, d_alpha, d_sigma = path_coefficients(path, at[i])
        out, x0, x1 = (value[i].numpy() for value in (OUT, X0, X1))
        residual = {
            "velocity": out - (d_alpha * x1 + d_sigma * x0),
            "noise": out - x0,
            "score": sigma * out + x0,
            "data": out - x1,
        }[prediction]
        spread = d_alpha / alpha * sigma**2 - sigma * d_sigma
        weight = {"none": 1, "velocity": (spread / sigma) ** 2, "likelihood": spread / sigma**2}[weighting]
        assert float(loss[i]) == pytest.approx(weight * np.mean(residual**2), rel=1e-8)


def test_a_perfect_model_has_no_loss_and_its_velocity_is_the_target():
    for path in PATHS:
        interpolant = Interpolant(path)
        mixture = SlowedMixture(time_law="uniform", slowing_law="interval", gamma=0.0, target_time="m")
        pair = mixture.pair(interpolant, mixture.draw(0.1 + 0.8 * uniforms(5, 16, 2)), x0=X0, x1=X1)
        sigma = torch.from_numpy(path_coefficients(path, pair.m.numpy())[1]).reshape(-1, 1, 1, 1)
        answers = {"velocity": pair.target, "noise": X0, "score": -X0 / sigma, "data": X1}
        for prediction, answer in answers.items():
            loss = per_sample_loss(lambda x, t, a=answer: a, pair, interpolant, prediction=prediction)
            assert float(loss.max()) < 1e-20
            field = velocity_field(lambda x, t, a=answer: a, interpolant, prediction)
            torch.testing.assert_close(field(pair.x_m, pair.t), pair.target, rtol=1e-7, atol=1e-7)


def test_misspelt_choices_are_refused():
    with pytest.raises(ValueError, match=r"^prediction must be one of 'velocity', 'noise', 'score', 'data', got 'v'$"):
        per_sample_loss(lambda x, t: x, slowed("linear"), Interpolant(), prediction="v")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^weighting must be one of 'none', 'velocity', 'likelihood', got 'v'$"):
        per_sample_loss(lambda x, t: x, slowed("linear"), Interpolant(), prediction="noise", weighting="v")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^prediction must be one of"):
        velocity_field(lambda x, t: x, Interpolant(), "x0")  # type: ignore[arg-type]


# Alignment


def test_alignment_is_minus_the_mean_cosine_over_tokens():
    projected, features = normals(5, 4, 6, 8), normals(6, 4, 6, 8)
    a, b = projected.numpy(), features.numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(alignment_loss(projected, features).numpy(), -cosine.mean(1), rtol=1e-12)
    np.testing.assert_allclose(alignment_loss(3 * features, features).numpy(), -np.ones(4), rtol=1e-12)
    with pytest.raises(ValueError, match=r"features must have the projector's shape \(4, 6, 8\), got \(4, 5, 8\)"):
        alignment_loss(projected, features[:, :5])


# Where a prediction determines a velocity


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("path", PATHS)
def test_the_implied_velocity_is_finite_on_the_times_it_is_defined_on(path, prediction):
    interval = torch.tensor(times_defined(path, prediction), dtype=torch.float64)
    field = velocity_field(lambda x, t: x, Interpolant(path), prediction)
    assert bool(torch.isfinite(field(torch.ones(2, 1, dtype=torch.float64), interval)).all())
    whole = torch.tensor([0.0, 1.0], dtype=torch.float64)
    needs_it = path == "vp" or prediction != "velocity"
    assert (times_defined(path, prediction) != (0.0, 1.0)) == needs_it
    if prediction in ("noise", "score") and path != "vp":
        assert not bool(torch.isfinite(field(torch.ones(2, 1, dtype=torch.float64), whole)).all())
