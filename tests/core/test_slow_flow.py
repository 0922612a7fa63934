"""The diagnostic: the slowed time against brute force and exact fields; the probe against a constant."""

from __future__ import annotations

import pytest
import torch
from scipy import optimize
from toys import PATHS, GaussianFlow, alpha_sigma, normals, uniforms

from mixflow_core.interpolant import Interpolant
from mixflow_core.slow_flow import NoiseLevelProbe, Quantiles, slowed_time, velocity_deficit

TIMES = (0.2, 0.4, 0.6, 0.8, 1.0)


@pytest.mark.parametrize("path", PATHS)
def test_the_slowed_time_is_that_of_the_nearest_point(path):
    x0, x1 = normals(1, 8, 3, 2, 2), normals(2, 8, 3, 2, 2)
    x = 0.5 * x0 + 0.4 * x1 + 0.3 * normals(3, 8, 3, 2, 2)
    found = slowed_time(x, Interpolant(path), x0=x0, x1=x1)
    for i in range(8):

        def distance(m, i=i):
            alpha, sigma = alpha_sigma(path, m)
            return float((x[i] - alpha * x1[i] - sigma * x0[i]).square().sum())

        start = min((k / 2000 for k in range(2001)), key=distance)
        bounds = (max(0, start - 1e-3), min(1, start + 1e-3))
        best = optimize.minimize_scalar(distance, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
        assert float(found[i]) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_point_of_the_path_lies_where_it_lies(path):
    m = uniforms(4, 32)
    x0, x1 = normals(1, 32, 10), normals(2, 32, 10)
    x = Interpolant(path).interpolate(x0=x0, x1=x1, t=m)
    found = slowed_time(x, Interpolant(path), x0=x0, x1=x1)
    torch.testing.assert_close(found, m, rtol=0, atol=1e-10 if path == "linear" else 1e-6)


@pytest.mark.parametrize("m", [0.0, 1.0])
def test_the_nearest_point_may_be_an_end_of_a_curved_path(m):
    x0, x1 = normals(1, 4, 10), normals(2, 4, 10)
    beyond = x1 - 0.5 * x0 if m else x0 - 0.5 * x1
    found = slowed_time(beyond, Interpolant("gvp"), x0=x0, x1=x1)
    torch.testing.assert_close(found, torch.full((4,), m, dtype=torch.float64), rtol=0, atol=1e-7)


def rollouts(sd=0.5, dimensions=64, n=2000):
    x0 = normals(1, n, dimensions)
    flow = GaussianFlow("linear", mean=0.0, sd=sd)
    return x0, flow, {t: flow.flow(x0, t) for t in TIMES}


def test_an_error_free_field_lags_when_paired_with_another_image():
    x0, _, states = rollouts()
    other = 0.5 * normals(2, *x0.shape)
    lags = []
    for t, x in states.items():
        m = slowed_time(x, Interpolant("linear"), x0=x0, x1=other)
        assert float((m <= t).double().mean()) > 0.99
        lags.append(float((t - m).median()))
    assert lags == sorted(lags)
    # In many dimensions m concentrates at (1 - S(t)) / (1 + sd^2), S the deviation of x_t.
    assert lags[-1] == pytest.approx(1 - (1 - 0.5) / (1 + 0.25), abs=0.02)


def test_against_its_own_end_point_an_error_free_field_is_slightly_ahead():
    x0, flow, states = rollouts()
    for t, x in states.items():
        m = slowed_time(x, Interpolant("linear"), x0=x0, x1=flow.flow(x0, 1.0))
        expected = (1 - flow.marginal(t)[1]) / (1 - 0.5)
        torch.testing.assert_close(m, torch.full_like(m, expected))
        assert expected >= t - 1e-12


def test_quantiles_stand_beside_their_times():
    rows = torch.stack([torch.arange(101.0), 10 * torch.arange(101.0)])
    quantiles = Quantiles.of(rows, torch.tensor([0.25, 0.75]))
    assert quantiles.times == [0.25, 0.75]
    assert quantiles.levels == [0.05, 0.25, 0.5, 0.75, 0.95]
    assert quantiles.values[0] == pytest.approx([5, 25, 50, 75, 95])
    assert quantiles.values[1] == pytest.approx([50, 250, 500, 750, 950])
    # Of 101 values the median's order statistics are the 41st and the 61st (Conover's tables), here their own places.
    assert (quantiles.low[0][2], quantiles.high[0][2]) == (40, 60)
    assert quantiles.high[1][2] == 600


def test_few_samples_have_quantiles_without_ends():
    quantiles = Quantiles.of(torch.arange(10.0)[None], torch.tensor([0.5]))
    assert (quantiles.low[0][0], quantiles.high[0][-1]) == (None, None)
    assert (quantiles.low[0][2], quantiles.high[0][2]) == (1, 8)  # as for the sign test of 10


def test_the_deficit_of_a_gaussian_field_on_true_states_is_its_relative_loss():
    """u = c x_t minimises E|u - v|^2 with c = Cov(v, x) / Var(x), so E|u|^2 = c^2 Var(x) and E|v|^2 = 1 + sd^2."""
    n, sd, t = 4000, 0.5, 0.3
    flow = GaussianFlow("linear", mean=0.0, sd=sd)
    x0, x1 = normals(1, n, 16), sd * normals(2, n, 16)
    x_t = t * x1 + (1 - t) * x0
    u, v = flow.field(x_t, torch.full((n,), t, dtype=torch.float64)), x1 - x0
    found = velocity_deficit(u.square().sum(1), v.square().sum(1))
    variance = t**2 * sd**2 + (1 - t) ** 2
    expected = 1 - (t * sd**2 - (1 - t)) ** 2 / variance / (1 + sd**2)
    assert found.low < expected < found.high
    assert found.high - found.low < 0.02
    loss = (u - v).square().sum() / v.square().sum()
    assert found.mean == pytest.approx(float(loss), abs=0.01)


def test_the_probe_reads_the_noise_level():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = NoiseLevelProbe(2, width=16)
    optimiser = torch.optim.Adam(probe.parameters(), lr=1e-2)
    linear = Interpolant("linear")

    def batch(seed, n=64):
        t = uniforms(seed, n).float()
        data = normals(seed + 1000, n, 2, 1, 1).float().expand(-1, -1, 6, 6)  # flat images
        return linear.interpolate(x0=normals(seed + 2000, n, 2, 6, 6).float(), x1=data, t=t), t

    for step in range(150):
        x, t = batch(step)
        loss = (probe(x) - t).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, t = batch(10_000, 1000)
    estimate = probe(x).detach()
    assert estimate.shape == (1000,)
    assert float((estimate - t).square().mean()) < 0.1 * float(t.var())
