"""Samplers on exact Gaussian fields: orders of convergence, final distributions, marginals of the SDE, calls."""

from __future__ import annotations

import dataclasses
import math
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from toys import PATHS, GaussianFlow, normals

from mixflow_core.interpolant import Interpolant
from mixflow_core.samplers import CountedField, Diffusion, Sampler, dopri5, euler, final, heun, sde, time_grid

X0 = normals(1, 50, 3)
FLOW = GaussianFlow("linear", mean=0.7, sd=0.5)


def grid64(num_steps, **options):
    return time_grid(num_steps, **options).double()


def no_noise(k):
    raise AssertionError("this sampler must not draw noise")


# Ordinary differential equations


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_order_of_convergence(solve, order, path):
    flow = GaussianFlow(path, mean=0.7, sd=0.5)
    errors = [
        float((final(solve(flow.field, X0, grid64(n))) - flow.flow(X0, 1.0)).abs().max()) for n in (40, 80, 160, 320)
    ]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.06)
    assert errors[-1] < 1e-2


@pytest.mark.parametrize(
    ("solve", "num_steps", "tolerance"), [(euler, 4000, 2e-3), (heun, 400, 1e-4), (dopri5, 1, 2e-2)]
)
def test_exact_fields_lead_noise_to_the_data_distribution(solve, num_steps, tolerance):
    for path in PATHS[:2]:
        flow = GaussianFlow(path, mean=-1.0, sd=1.5)
        torch.testing.assert_close(
            final(solve(flow.field, X0, grid64(num_steps))), flow.flow(X0, 1.0), rtol=0, atol=tolerance
        )


def test_vp_leads_to_the_data_distribution_too():
    flow = GaussianFlow("vp", mean=-1.0, sd=1.5)
    start = flow.flow(X0, 0.0)
    torch.testing.assert_close(final(euler(flow.field, start, grid64(4000))), flow.flow(X0, 1.0), rtol=0, atol=2e-3)


@pytest.mark.parametrize("solve", [euler, heun, dopri5])
def test_states_lie_at_the_times_of_the_grid(solve):
    grid = grid64(200)
    states = list(solve(FLOW.field, X0, grid))
    assert len(states) == 201
    for k in (0, 77, 200):
        torch.testing.assert_close(states[k], FLOW.flow(X0, float(grid[k])), rtol=0, atol=1.5e-2)
    assert torch.equal(states[0], X0)


def test_backwards_from_data_to_noise():
    x1 = FLOW.flow(X0, 1.0)
    torch.testing.assert_close(final(heun(FLOW.field, x1, grid64(200, start=1.0, end=0.0))), X0, rtol=0, atol=1e-4)


def test_dopri5_answers_to_its_tolerances():
    def error(tolerance):
        end = final(dopri5(FLOW.field, X0, grid64(1), atol=tolerance, rtol=tolerance))
        return float((end - FLOW.flow(X0, 1.0)).abs().max())

    assert error(1e-9) < 1e-7 < error(1e-2)


def test_states_keep_the_type_of_the_start():
    for solve in (euler, heun, dopri5):
        assert final(solve(FLOW.field, X0.float(), time_grid(2))).dtype == torch.float32
        assert final(solve(FLOW.field, X0, time_grid(2))).dtype == torch.float64


@pytest.mark.parametrize("sampler", [Sampler("euler", 50), Sampler("heun", 50), Sampler("sde", 50)])
def test_many_steps_hold_few_states(sampler):
    seen = []

    def field(x, t):
        seen.append(weakref.ref(x))
        assert sum(state() is not None for state in seen) <= 4
        return FLOW.field(x, t)

    sampler.run(field, X0, Interpolant("linear"), lambda k: normals(k, *X0.shape))
    assert len(seen) >= 50


# Time grids and counting


def test_num_steps_means_steps():
    torch.testing.assert_close(time_grid(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), rtol=0, atol=1e-7)
    torch.testing.assert_close(time_grid(2, start=1.0, end=0.5), torch.tensor([1.0, 0.75, 0.5]), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"^num_steps must be at least 1, got 0$"):
        time_grid(0)


def test_a_shifted_grid_spends_its_steps_near_the_noise():
    s = 1 - np.linspace(0, 1, 5)
    np.testing.assert_allclose(time_grid(4, shift=3.0), 1 - 3 * s / (1 + 2 * s), atol=1e-6)
    grid = time_grid(50, shift=6.93)
    assert float(grid[0]) == 0
    assert float(grid[-1]) == 1
    assert bool((grid.diff() > 0).all())
    assert float(grid[1]) < 0.02 / 5  # the first step is about 1/shift of an even one


@pytest.mark.parametrize(("solve", "per_step"), [(euler, 1), (heun, 2)])
def test_evaluations_are_counted(solve, per_step):
    field = CountedField(FLOW.field)
    assert field.nfe == 0
    final(solve(field, X0, grid64(7)))
    assert field.nfe == 7 * per_step


def test_a_guided_model_counts_two_rows_a_sample_as_two_evaluations():
    model = CountedField(lambda x, t, y: x, 3)
    x, t = torch.zeros(6, 1), torch.zeros(6)
    model(x, t, t)
    model(x[:3], t[:3], t[:3])
    assert model.nfe == 3


def test_dopri5_counts_what_it_called():
    calls = []

    def field(x, t):
        calls.append(t)
        return FLOW.field(x, t)

    counted = CountedField(field)
    final(dopri5(counted, X0, grid64(1)))
    assert counted.nfe == len(calls) > 7


# The stochastic differential equation


def simulate(flow, form, *, num_steps, corrector=False, last_step="none", start=0.0, end=1.0, n=40_000, norm=1.0):
    numbers = np.random.default_rng(7)
    mean, sd = flow.marginal(start)
    x = mean + sd * torch.from_numpy(numbers.standard_normal((n, 1)))
    grid = grid64(num_steps, start=start, end=end)
    noise = lambda k: torch.from_numpy(numbers.standard_normal((n, 1)))  # noqa: E731
    interpolant = Interpolant(flow.path)
    diffusion = Diffusion(form, norm)
    return list(
        sde(flow.field, x, grid, interpolant, noise, diffusion=diffusion, corrector=corrector, last_step=last_step)
    )


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("form", ["sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_every_diffusion_keeps_the_marginals(path, form, corrector):
    flow = GaussianFlow(path, mean=0.7, sd=0.5)
    # sbdm is infinite at t = 0, the score at t = 1.
    states = simulate(flow, form, num_steps=150, corrector=corrector, start=0.05 if form == "sbdm" else 0.0, end=0.96)
    times = time_grid(150, start=0.05 if form == "sbdm" else 0.0, end=0.96)
    for k in (75, 150):
        mean, sd = flow.marginal(float(times[k]))
        # 40,000 samples know the deviation to 0.4 %; 150 Euler steps are 1-3 % off, and a wrong noise 20 % and more.
        assert float(states[k].std()) == pytest.approx(sd, rel=0.015 if corrector else 0.035)
        assert float(states[k].mean()) == pytest.approx(mean, abs=0.02)


def test_more_diffusion_keeps_the_marginals_too():
    flow = GaussianFlow("linear", mean=0.7, sd=0.5)
    for norm in (0.0, 0.3, 2.0):
        end = simulate(flow, "sigma", num_steps=300, end=0.96, norm=norm)[-1]
        assert float(end.std()) == pytest.approx(flow.marginal(0.96)[1], rel=0.03)


def test_without_diffusion_the_sde_is_the_ode():
    grid = grid64(20, end=0.96)
    noise = lambda k: normals(k, *X0.shape)  # noqa: E731
    without = {"diffusion": Diffusion("sigma", 0.0), "last_step": "none"}
    for corrector, solve in ((False, euler), (True, heun)):
        states = sde(FLOW.field, X0, grid, Interpolant("linear"), noise, corrector=corrector, **without)
        for a, b in zip(states, solve(FLOW.field, X0, grid), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_last_steps(path):
    flow, interpolant = GaussianFlow(path, mean=0.7, sd=0.5), Interpolant(path)
    mean, sd = flow.marginal(float(np.float32(0.96)))
    noise = lambda k: normals(k, *X0.shape)  # noqa: E731
    runs = {
        last: list(sde(flow.field, X0, grid64(5, end=0.96), interpolant, noise, last_step=last))
        for last in ("none", "mean", "euler", "tweedie")
    }
    assert [len(states) for states in runs.values()] == [6, 7, 7, 7]
    x, t = runs["none"][-1], float(np.float32(0.96))
    velocity = flow.field(x, torch.full((len(x),), t, dtype=torch.float64))
    score = -(x - mean) / sd**2
    w = {"linear": 1 - t, "gvp": math.cos(math.pi * t / 2)}[path]
    truth = {
        "euler": x + (1 - t) * velocity,
        "mean": x + (1 - t) * (velocity + w * score),
        "tweedie": flow.posterior_data(x, t),
    }
    for last, expected in truth.items():
        assert torch.equal(runs[last][-2], x)
        torch.testing.assert_close(runs[last][-1], expected, rtol=0, atol=1e-6)


def test_one_step_of_the_sde_is_the_formula():
    t, h, noise = 0.3, 0.2, normals(5, *X0.shape)
    grid = torch.tensor([t, t + h], dtype=torch.float64)
    mean, sd = FLOW.marginal(t)
    velocity = FLOW.field(X0, torch.full((50,), t, dtype=torch.float64))
    w = 2 * (1 - t)
    expected = X0 + h * (velocity - w * (X0 - mean) / sd**2) + math.sqrt(2 * w * h) * noise
    diffusion = Diffusion("linear", 2.0)
    states = sde(FLOW.field, X0, grid, Interpolant("linear"), lambda k: noise, diffusion=diffusion, last_step="none")
    torch.testing.assert_close(final(states), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("form", "norm", "w"),
    [
        ("sbdm", 2.0, lambda t: 2 * (1 - t) / t),
        ("sigma", 2.0, lambda t: 2 * (1 - t)),
        ("linear", 2.0, lambda t: 2 * (1 - t)),
        ("decreasing", 0.5, lambda t: (0.5 * np.cos(np.pi * t) + 1) ** 2 / 4),
        ("increasing_decreasing", 2.0, lambda t: 2 * np.sin(np.pi * t) ** 2),
    ],
)
def test_diffusion_forms(form, norm, w):
    t = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(Diffusion(form, norm)(Interpolant("linear"), torch.from_numpy(t)), w(t), rtol=1e-12)


def test_sde_noise_is_asked_for_once_a_noisy_step_in_order():
    asked = []

    def noise(k):
        asked.append(k)
        return normals(k, *X0.shape)

    field = CountedField(FLOW.field)
    final(sde(field, X0, grid64(4, end=0.96), Interpolant("linear"), noise))
    assert asked == [0, 1, 2, 3]
    assert field.nfe == 5
    field = CountedField(FLOW.field)
    final(sde(field, X0, grid64(4, end=0.96), Interpolant("linear"), noise, corrector=True, last_step="none"))
    assert field.nfe == 8


# What a protocol names


@pytest.mark.parametrize(
    ("sampler", "nfe"),
    [
        (Sampler("euler", 20), 20),
        (Sampler("heun", 10), 20),
        (Sampler("sde", 20), 20),
        (Sampler("euler", 8, shift=3.0), 8),
        (Sampler("sde_heun", 20), 39),
        (Sampler("sde", 20, last_step="none"), 20),
    ],
)
def test_a_sampler_spends_what_it_says(sampler, nfe):
    field = CountedField(FLOW.field)
    final = sampler.run(field, X0, Interpolant("linear"), lambda k: normals(k, *X0.shape))
    assert field.nfe == nfe
    assert final.shape == X0.shape
    assert nfe <= sampler.expected_nfe <= nfe + 1
    assert dataclasses.replace(sampler, guidance_scale=1.5).expected_nfe == 2 * sampler.expected_nfe


def test_samplers_run_their_method_on_their_grid():
    linear = Interpolant("linear")
    runs = {
        Sampler("euler", 6): final(euler(FLOW.field, X0, time_grid(6))),
        Sampler("euler", 6, shift=3.0): final(euler(FLOW.field, X0, time_grid(6, shift=3.0))),
        Sampler("heun", 6): final(heun(FLOW.field, X0, time_grid(6))),
        Sampler("dopri5", 1): final(dopri5(FLOW.field, X0, time_grid(1))),
        Sampler("euler", 6, start=0.001, end=0.999): final(euler(FLOW.field, X0, time_grid(6, start=0.001, end=0.999))),
        Sampler("euler", 6, end=0.999, shift=6.93): final(euler(FLOW.field, X0, time_grid(6, end=0.999, shift=6.93))),
    }
    for sampler, expected in runs.items():
        assert torch.equal(sampler.run(FLOW.field, X0, linear, no_noise), expected)
    noise = lambda k: normals(k, *X0.shape)  # noqa: E731
    stochastic = sde(
        FLOW.field, X0, time_grid(5, end=0.96), linear, noise, diffusion=Diffusion("sigma"), last_step="mean"
    )
    assert torch.equal(Sampler("sde", 6).run(FLOW.field, X0, linear, noise), final(stochastic))
    settings = {"diffusion": Diffusion("linear"), "corrector": True, "last_step": "tweedie"}
    stochastic = sde(FLOW.field, X0, time_grid(5, start=0.1, end=0.9), linear, noise, **settings)
    sampler = Sampler("sde_heun", 6, start=0.1, diffusion="linear", last_step="tweedie", last_step_size=0.1)
    assert torch.equal(sampler.run(FLOW.field, X0, linear, noise), final(stochastic))
    stochastic = sde(FLOW.field, X0, time_grid(6, end=0.95), linear, noise, last_step="none")
    assert torch.equal(
        Sampler("sde", 6, end=0.95, last_step="none").run(FLOW.field, X0, linear, noise), final(stochastic)
    )


@pytest.mark.parametrize(
    ("sampler", "times"),
    [
        (Sampler("euler", 4), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (Sampler("heun", 2, start=0.2, end=0.8), [0.2, 0.5, 0.8]),
        (Sampler("sde", 4, last_step_size=0.1), [0.0, 0.3, 0.6, 0.9, 1.0]),
        (Sampler("sde_heun", 2, end=0.9, last_step="none"), [0.0, 0.45, 0.9]),
    ],
)
def test_a_sampler_is_evaluated_at_its_times_alone(sampler, times):
    np.testing.assert_allclose(sampler.times(), times, atol=1e-7)
    seen = []
    sampler.run(
        lambda x, t: seen.append(float(t[0])) or FLOW.field(x, t),
        X0,
        Interpolant("linear"),
        lambda k: normals(k, *X0.shape),
    )
    assert set(seen) <= set(sampler.times().tolist())
    assert set(sampler.times()[:-1].tolist()) <= set(seen)


def test_the_published_grid_of_rae_stops_before_the_data():
    # 50 published "steps" are 49, from noise to 0.0068873 of it, at the shift of 768 x 16 x 16 latents.
    sampler = Sampler("euler", 49, shift=math.sqrt(48), end=0.999)
    seen = []
    sampler.run(lambda x, t: seen.append(float(t[0])) or torch.zeros_like(x), X0, Interpolant("linear"), no_noise)
    assert len(seen) == 49
    assert seen[0] == 0
    s = np.linspace(1, 0.001, 50)
    np.testing.assert_allclose(seen, 1 - (math.sqrt(48) * s / (1 + (math.sqrt(48) - 1) * s))[:-1], atol=1e-6)
    assert 1 - float(time_grid(49, end=0.999, shift=math.sqrt(48))[-1]) == pytest.approx(0.0068873, abs=1e-6)


def test_the_sde_sampler_reaches_the_data_distribution():
    x0 = normals(9, 40_000, 1)
    final = Sampler("sde", 200).run(FLOW.field, x0, Interpolant("linear"), lambda k: normals(100 + k, *x0.shape))
    assert float(final.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(final.std()) == pytest.approx(0.5, rel=0.03)


def test_names_are_those_of_metric_keys():
    assert Sampler("euler", 8, guidance_scale=1.5).name == "euler8/s1.5"
    assert Sampler("sde", 20).name == "sde20/s1"
    guided = Sampler("heun", 125, guidance_scale=1.5, guidance_channels=3, guidance_interval=(0.3, 1.0))
    assert guided.name == "heun125/s1.5-ch3-in0.3to1"


def test_every_setting_of_a_protocol_changes_its_name():
    plain = {"method": "sde", "num_steps": 20, "guidance_scale": 1.5}
    changes = [
        {}, {"method": "sde_heun"}, {"num_steps": 21}, {"guidance_scale": 2.0}, {"shift": 2.0}, {"start": 0.001},
        {"end": 0.999, "last_step": "none"}, {"last_step": "none"}, {"guidance": "autoguidance"},
        {"guidance_channels": 3}, {"guidance_interval": (0.3, 1.0)},
        {"guidance_interval": (0.0, 0.3)}, {"diffusion": "linear"}, {"last_step": "euler"}, {"last_step_size": 0.1},
    ]  # fmt: skip
    assert {key for change in changes for key in change} == {field.name for field in dataclasses.fields(Sampler)}
    names = [Sampler(**plain | change).name for change in changes]
    assert len(set(names)) == len(names)


def test_an_end_of_the_guidance_interval_at_an_end_of_time_is_open():
    assert Sampler("euler", 1).open_guidance_interval == (-math.inf, math.inf)
    guided = {"method": "euler", "num_steps": 1, "guidance_scale": 1.5}
    assert Sampler(**guided, guidance_interval=(0.3, 1.0)).open_guidance_interval == (0.3, math.inf)
    assert Sampler(**guided, guidance_interval=(0.0, 0.7)).open_guidance_interval == (-math.inf, 0.7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "euler", "num_steps": 0}, "num_steps must be at least 1 for euler, got 0"),
        ({"method": "sde", "num_steps": 1}, "num_steps must be at least 2 for sde, got 1"),
        ({"method": "dopri5", "num_steps": 50}, "num_steps must be 1 for dopri5, which chooses its own steps, got 50"),
        (
            {"method": "rk4", "num_steps": 1},
            "method must be one of 'euler', 'heun', 'dopri5', 'sde', 'sde_heun', got 'rk4'",
        ),
        (
            {"method": "euler", "num_steps": 1, "guidance_scale": 0.5},
            "guidance_scale must be at least 1, got 0.5; 1 is unguided",
        ),
        (
            {"method": "euler", "num_steps": 1, "start": 0.5, "end": 0.5},
            "start and end must satisfy 0 <= start < end <= 1, got 0.5 and 0.5",
        ),
        (
            {"method": "euler", "num_steps": 1, "guidance_interval": (0.0, 1.5)},
            "guidance_interval must satisfy 0 <= low < high <= 1, got [0.0, 1.5]",
        ),
        (
            {"method": "euler", "num_steps": 1, "guidance_channels": -1},
            "guidance_channels must be at least 0, got -1; 0 is all",
        ),
        (
            {
                "method": "euler",
                "num_steps": 1,
                "guidance_scale": 2.0,
                "guidance": "autoguidance",
                "guidance_channels": 3,
            },
            "guidance_channels must be 0 for autoguidance, got 3; omit it",
        ),
        (
            {"method": "sde", "num_steps": 3, "end": 0.5},
            "end must be 1 for an SDE with a last step, got 0.5; set last_step_size, or last_step: none",
        ),
        (
            {"method": "sde", "num_steps": 2, "last_step_size": 1.0},
            "last_step_size must lie in (0, 1 - start), got 1.0",
        ),
        (
            {"method": "heun", "num_steps": 2, "last_step": "none"},
            "last_step must be left out for heun, which has no noise, got 'none'",
        ),
        (
            {"method": "euler", "num_steps": 2, "last_step_size": 0.1},
            "last_step_size must be left out for euler, which has no noise, got 0.1",
        ),
        ({"method": "euler", "num_steps": 10**13}, f"num_steps must be at most 10000, got {10**13}; lower it"),
        *(
            (
                {"method": "euler", "num_steps": 1, name: value},
                f"{name} must be left out at guidance_scale 1, which is unguided, got {value!r}; raise guidance_scale, "
                "or remove it",
            )
            for name, value in (
                ("guidance", "autoguidance"),
                ("guidance_channels", 3),
                ("guidance_interval", (0.1, 0.5)),
            )
        ),
        ({"method": "euler", "num_steps": 1, "shift": 0.5}, "shift must be at least 1, got 0.5; 1 is no shift"),
        ({"method": "euler", "num_steps": 1, "shift": math.nan}, "shift must be at least 1, got nan; 1 is no shift"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        Sampler(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "changes", ['"num_step": 3', '"guidance_scale": true', '"shift": "1"', '"num_steps": 3.5', '"num_steps": true']
)
def test_a_recipe_with_a_slip_is_refused_by_name(changes):
    with pytest.raises(ValidationError, match=changes.split('"')[1]):
        TypeAdapter(Sampler).validate_json('{"method": "euler", "num_steps": 3, ' + changes + "}")


def test_misspelt_choices_of_the_sde_are_refused():
    with pytest.raises(ValueError, match="form must be one of"):
        Diffusion("increasing-decreasing")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ValueError, match="last_step must be one of"):
        next(sde(FLOW.field, X0, grid64(2), Interpolant("linear"), no_noise, last_step="Mean"))  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0000001, 1.2345678, 1.0 + 2**-52])
def test_names_of_cells_tell_close_settings_apart(scale):
    name = Sampler("euler", 5, guidance_scale=scale).name
    assert float(name.removeprefix("euler5/s")) == scale
    assert name != Sampler("euler", 5).name
