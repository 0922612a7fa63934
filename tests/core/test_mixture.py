"""Algorithm 1: one whole step against a NumPy oracle, and the laws of t and m against exact distribution functions."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import special, stats
from toys import PATHS, normals, path_coefficients, uniforms

from mixflow_core.interpolant import Interpolant
from mixflow_core.loss import per_sample_loss
from mixflow_core.mixture import SlowedMixture, shift_time

N = 200_000
U = uniforms(11, N, 2)
TIME_CDFS = {
    "beta": lambda t: t**2,
    "uniform": lambda t: t,
    "logit_normal": lambda t: stats.norm.cdf(special.logit(t)),
    "log_normal_angle": lambda t: stats.norm.cdf(np.log(np.tan(np.pi * np.asarray(t) / 2))),
}
TIME_QUANTILES = {
    "beta": np.sqrt,
    "uniform": np.array,
    "logit_normal": lambda u: special.expit(special.ndtri(u)),
    "log_normal_angle": lambda u: 2 / np.pi * np.arctan(np.exp(special.ndtri(u))),
}


def mixture(**changes) -> SlowedMixture:
    return SlowedMixture(**{"time_law": "beta", "slowing_law": "interval", "gamma": 0.8, "target_time": "m"} | changes)


def assert_law(values, cdf):
    # 200,000 draws: a distance of 0.005 between distribution functions is already refused.
    assert stats.kstest(np.asarray(values), cdf).pvalue > 1e-3


def slowed_cdf(m, gamma):
    """Distribution function of m ~ U[(1 - gamma) t, t], t ~ Beta(2, 1): the integral of its density."""
    m = np.asarray(m)
    edge = 1 - gamma
    below = m**2 / (2 * edge) if edge else np.zeros_like(m)
    integral = np.where(m <= edge, below, edge / 2 + (m - edge))
    return 2 / gamma * (integral - m**2 / 2)


# One whole step


def oracle(u, x0, x1, weight, bias, *, path, time_law, slowing_law, gamma, shift, target_time, condition_on):
    """Uniform numbers, noise and data to the loss of the model x W + t b, in NumPy float64."""
    t = TIME_QUANTILES[time_law](u[:, 0])
    s = shift * (1 - t) / (1 + (shift - 1) * (1 - t))
    # The paper's slowing, written in reversed time.
    s_m = s + u[:, 1] * gamma * (1 - s) if slowing_law == "interval" else 1 - u[:, 1]
    t, m = 1 - s, 1 - s_m
    told = m if condition_on == "m" else t
    target_at = m if target_time == "m" else told
    alpha, sigma, _, _ = (c[:, None] for c in path_coefficients(path, m))
    x_m = alpha * x1 + sigma * x0
    _, _, d_alpha, d_sigma = (c[:, None] for c in path_coefficients(path, target_at))
    target = d_alpha * x1 + d_sigma * x0
    residual = x_m @ weight + told[:, None] * bias - target
    return told, m, x_m, target, (residual**2).mean(1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target_time", ["m", "t"])
@pytest.mark.parametrize("condition_on", ["t", "m"])
@pytest.mark.parametrize("time_law", TIME_CDFS)
@pytest.mark.parametrize(
    ("slowing_law", "gamma"), [("interval", 0.0), ("interval", 0.4), ("interval", 1.0), ("independent", 0.0)]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_step_equals_the_oracle(path, target_time, condition_on, time_law, slowing_law, gamma, shift):
    settings = {
        "time_law": time_law, "slowing_law": slowing_law, "gamma": gamma, "shift": shift,
        "target_time": target_time, "condition_on": condition_on,
    }  # fmt: skip
    u, x0, x1 = uniforms(1, 32, 2), normals(2, 32, 6), normals(3, 32, 6)
    weight, bias = normals(4, 6, 6), normals(5, 6)
    mix, interpolant = SlowedMixture(**settings), Interpolant(path)
    pair = mix.pair(interpolant, mix.draw(u), x0=x0, x1=x1)
    loss = per_sample_loss(lambda x, t: x @ weight + t[:, None] * bias, pair, interpolant)
    arrays = (value.numpy() for value in (u, x0, x1, weight, bias))
    for actual, expected in zip(
        (pair.t, pair.m, pair.x_m, pair.target, loss), oracle(*arrays, path=path, **settings), strict=True
    ):
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9)


# Laws


@pytest.mark.parametrize("time_law", TIME_CDFS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.93])
def test_law_of_the_network_time(time_law, shift):
    t = mixture(time_law=time_law, shift=shift, gamma=0.3).draw(U).t.numpy()

    def cdf(value):  # change of variables: the time before the shift whose shifted time is `value`
        s = 1 - value
        return TIME_CDFS[time_law](1 - s / (shift - (shift - 1) * s))

    assert_law(t, cdf)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_law_of_the_slowed_time_under_beta(gamma):
    m = mixture(gamma=gamma).draw(U).m.numpy()
    assert_law(m, lambda value: slowed_cdf(value, gamma))
    assert m.mean() == pytest.approx(2 / 3 * (1 - gamma / 2), abs=0.003)


def test_the_stated_density_integrates_to_the_distribution_function_used_here():
    for gamma in (0.1, 0.5, 1.0):
        grid = np.linspace(0, 1, 20_001)
        middle = (grid[1:] + grid[:-1]) / 2
        density = 2 / gamma * (np.minimum(1, middle / (1 - gamma) if gamma < 1 else 1) - middle)
        np.testing.assert_allclose(np.cumsum(density) / 20_000, slowed_cdf(grid[1:], gamma), atol=1e-6)


@pytest.mark.parametrize("time_law", TIME_CDFS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_m_is_uniform_below_t_whatever_t_is(time_law, shift):
    t, m = mixture(time_law=time_law, shift=shift, gamma=0.4).draw(U)
    assert bool(((m <= t) & (m >= 0.6 * t * (1 - 1e-12))).all())
    lag = ((t - m) / (0.4 * t)).numpy()
    assert_law(lag, "uniform")
    for half in (t.numpy() < np.median(t), t.numpy() >= np.median(t)):
        assert_law(lag[half], "uniform")


def test_independent_m_is_uniform_and_knows_nothing_of_t():
    t, m = mixture(slowing_law="independent", gamma=0.0).draw(U)
    assert_law(m, "uniform")
    assert_law(t, lambda value: value**2)
    assert_law(m.numpy()[t.numpy() > 0.8], "uniform")


def test_float32_times_stay_inside_the_unit_interval():
    u = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24], dtype=torch.float32)
    corners = torch.cartesian_prod(u, u)
    for time_law, gamma, shift in itertools.product(TIME_CDFS, (0.0, 0.8, 1.0), (1.0, 6.93)):
        t, m = mixture(time_law=time_law, gamma=gamma, shift=shift).draw(corners)
        assert t.dtype == torch.float32
        assert bool(((m >= 0) & (m <= t) & (t <= 1)).all()), (time_law, gamma, shift)


@pytest.mark.parametrize("time_law", TIME_CDFS)
@pytest.mark.parametrize("interval", [(0.001, 1.0), (0.0, 0.9995), (0.2, 0.7)])
def test_interval_truncates_the_time_law(time_law, interval):
    t = mixture(time_law=time_law, interval=interval, gamma=0.0).draw(U).t.numpy()
    below, above = (TIME_CDFS[time_law](end) if 0 < end < 1 else end for end in interval)
    assert t.min() >= interval[0] - 1e-12
    assert t.max() <= interval[1] + 1e-12
    assert_law(t, lambda value: (TIME_CDFS[time_law](value) - below) / (above - below))


def test_raes_published_mixflow_times_are_beta_truncated_at_the_data():
    u = U[:, 0].numpy()
    s = 1 - np.sqrt(0.999 * u)  # RAE draws its uniform number on [0, 0.999]
    t = mixture(interval=(0.0, float(np.sqrt(0.999)))).draw(U).t.numpy()
    np.testing.assert_allclose(t, 1 - s, atol=1e-12)
    assert s.min() == pytest.approx(0.0005, abs=1e-5)


def test_slowing_may_come_before_the_shift():
    u = U[:1000]
    plain = mixture(gamma=0.4).draw(u)
    t, m = mixture(gamma=0.4, shift=3.0, order="slow_then_shift").draw(u)
    for shifted, value in ((t, plain.t), (m, plain.m)):
        np.testing.assert_allclose(1 - shifted, 3 * (1 - value) / (1 + 2 * (1 - value)), atol=1e-12)
    assert not torch.allclose(m, mixture(gamma=0.4, shift=3.0).draw(u).m, atol=1e-3)


# Controls


@pytest.mark.parametrize("time_law", TIME_CDFS)
def test_no_slowing_is_standard_interpolation(time_law):
    t, m = mixture(time_law=time_law, gamma=0.0).draw(U[:1000])
    assert torch.equal(t, m)
    assert torch.equal(t, mixture(time_law=time_law, gamma=0.8).draw(U[:1000]).t)


def test_matched_marginal_sees_the_same_samples_and_is_told_where_they_lie():
    x0, x1 = normals(1, 100, 4), normals(2, 100, 4)
    for path, shift, slowing in itertools.product(
        PATHS, (1.0, 3.0), ({"gamma": 0.8}, {"gamma": 0.0, "slowing_law": "independent"})
    ):
        arm, control = mixture(shift=shift, **slowing), mixture(shift=shift, condition_on="m", **slowing)
        pairs = [mix.pair(Interpolant(path), mix.draw(U[:100]), x0=x0, x1=x1) for mix in (arm, control)]
        assert torch.equal(pairs[0].x_m, pairs[1].x_m)
        assert torch.equal(pairs[0].m, pairs[1].m)
        assert torch.equal(pairs[0].target, pairs[1].target)
        assert torch.equal(pairs[1].t, pairs[1].m)
        assert not torch.equal(pairs[0].t, pairs[0].m)


def test_is_standard_says_whether_the_network_is_told_the_truth():
    arms = [mixture(), mixture(condition_on="m"), mixture(gamma=0.0), mixture(gamma=0.0, slowing_law="independent")]
    told_the_truth = [bool((arm.draw(U[:50]).t == arm.draw(U[:50]).m).all()) for arm in arms]
    assert told_the_truth == [False, True, True, False]
    assert [arm.is_standard for arm in arms] == told_the_truth


def test_shift_is_the_formula_in_reversed_time():
    s = np.linspace(0, 1, 11)
    shifted = shift_time(torch.from_numpy(1 - s), 3.0).numpy()
    np.testing.assert_allclose(1 - shifted, 3 * s / (1 + 2 * s), atol=1e-15)
    # Data-ward medians of Beta(2, 1) under the shifts in use, as published.
    median = torch.tensor([0.5], dtype=torch.float64).sqrt()
    assert [round(float(shift_time(median, k)), 3) for k in (1.0, 3.0, 6.93)] == [0.707, 0.446, 0.258]


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, "gamma must lie in [0, 1], got 1.5"),
        ({"gamma": -0.1}, "gamma must lie in [0, 1], got -0.1"),
        ({"gamma": float("nan")}, "gamma must lie in [0, 1], got nan"),
        ({"slowing_law": "independent"}, "gamma must be 0 with slowing_law 'independent', got 0.8"),
        ({"shift": 0.5}, "shift must be at least 1, got 0.5"),
        ({"shift": float("inf")}, "shift must be at least 1, got inf"),
        ({"shift": float("nan")}, "shift must be at least 1, got nan"),
        (
            {"time_law": "Beta"},
            "time_law must be one of 'beta', 'uniform', 'logit_normal', 'log_normal_angle', got 'Beta'",
        ),
        ({"interval": (0.5, 0.5)}, "interval must satisfy 0 <= lowest < highest <= 1, got [0.5, 0.5]"),
        ({"interval": (-0.1, 0.5)}, "interval must satisfy 0 <= lowest < highest <= 1, got [-0.1, 0.5]"),
        ({"interval": (0.0, 1.1)}, "interval must satisfy 0 <= lowest < highest <= 1, got [0.0, 1.1]"),
        ({"order": "both"}, "order must be one of 'shift_then_slow', 'slow_then_shift', got 'both'"),
        ({"slowing_law": "none"}, "slowing_law must be one of 'interval', 'independent', got 'none'"),
        ({"target_time": "x"}, "target_time must be one of 't', 'm', got 'x'"),
        ({"condition_on": "M"}, "condition_on must be one of 't', 'm', got 'M'"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        mixture(**changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# A recipe is validated as JSON, in which strict mode takes an object for a dataclass and bends nothing else.
GOOD = {"time_law": "beta", "slowing_law": "interval", "gamma": 0.8, "target_time": "m"}


def read(settings) -> SlowedMixture:
    return TypeAdapter(SlowedMixture).validate_json(json.dumps(settings))


def test_a_recipe_is_read_as_it_stands():
    assert read(GOOD | {"gamma": 1}) == mixture(gamma=1.0)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"gama": 0.5}, "gama"),
        ({"gamma": True}, "gamma"),
        ({"gamma": "0.8"}, "gamma"),
        ({"shift": False}, "shift"),
        ({"time_law": "betta"}, "time_law"),
        ({"target_time": None}, "target_time"),
    ],
)
def test_a_recipe_with_a_slip_is_refused_by_name(changes, where):
    with pytest.raises(ValidationError) as error:
        read(GOOD | changes)
    assert [e["loc"] for e in error.value.errors()] == [(where,)]


@pytest.mark.parametrize("missing", ["time_law", "slowing_law", "gamma", "target_time"])
def test_what_defines_the_method_has_no_hidden_default(missing):
    with pytest.raises(ValidationError, match=missing):
        read({k: v for k, v in GOOD.items() if k != missing})


def test_a_shift_leaves_both_ends_exactly_where_they_are():
    """Whatever the shift: what divides by t, or asks whether t is 0, sees no rounded 0."""
    for shift in np.linspace(1.01, 15, 1400):
        ends = shift_time(torch.tensor([0.0, 1.0]), float(shift))
        assert ends.tolist() == [0, 1], shift
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    s = 1 - t
    torch.testing.assert_close(shift_time(t, 3.0), 1 - 3 * s / (1 + 2 * s), rtol=0, atol=1e-15)
