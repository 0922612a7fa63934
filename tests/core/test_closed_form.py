"""The best linear velocity for Gaussian data under the mixture has a closed form; draws of the mixture must find it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate
from toys import normals, uniforms

from mixflow_core.interpolant import Interpolant
from mixflow_core.mixture import SlowedMixture

N = 400_000
X0, X1, U = normals(1, N), normals(2, N), uniforms(3, N)


def coefficient(gamma, sd, t):
    """E[u* x_m] / E[x_m^2] for data N(0, sd^2), linear path, m ~ U[(1 - gamma) t, t]."""
    mean, square = t * (1 - gamma / 2), t**2 * (1 - gamma + gamma**2 / 3)
    return (mean * (sd**2 + 1) - 1) / (square * (sd**2 + 1) - 2 * mean + 1)


def test_the_closed_form_follows_from_the_definitions():
    for gamma, sd, t in ((0.3, 0.5, 0.9), (0.8, 2.0, 0.5), (1.0, 1.0, 1.0)):
        low = (1 - gamma) * t
        product = integrate.quad(lambda m, sd=sd: (m * sd**2 - (1 - m)) / 1, low, t)[0]
        square = integrate.quad(lambda m, sd=sd: m**2 * sd**2 + (1 - m) ** 2, low, t)[0]
        assert coefficient(gamma, sd, t) == pytest.approx(product / square, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("sd", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("t", [0.2, 0.6, 1.0])
def test_least_squares_on_draws_finds_the_closed_form(gamma, sd, t):
    mixture = SlowedMixture(time_law="beta", slowing_law="interval", gamma=gamma, target_time="m")
    u = torch.stack([torch.full((N,), t**2, dtype=torch.float64), U], 1)  # Beta(2, 1) by inversion: this is time t
    x1 = sd * X1
    pair = mixture.pair(Interpolant("linear"), mixture.draw(u), x0=X0, x1=x1)
    found = float((pair.x_m * pair.target).sum() / pair.x_m.square().sum())
    assert found == pytest.approx(coefficient(gamma, sd, t), abs=0.006)


@pytest.mark.parametrize("sd", [0.3, 2.0])
def test_the_matched_marginal_finds_the_standard_field_at_every_told_time(sd):
    mixture = SlowedMixture(time_law="beta", slowing_law="interval", gamma=0.8, target_time="m", condition_on="m")
    times = mixture.draw(uniforms(4, N, 2))
    pair = mixture.pair(Interpolant("linear"), times, x0=X0, x1=sd * X1)
    for low in (0.1, 0.4, 0.7):
        here = (times.t >= low) & (times.t < low + 0.1)
        x, u, t = (value[here].numpy() for value in (pair.x_m, pair.target, times.t))
        expected = np.sum(coefficient(0.0, sd, t) * x * x) / np.sum(x * x)
        assert np.sum(u * x) / np.sum(x * x) == pytest.approx(expected, abs=0.04)
