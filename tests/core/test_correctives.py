"""Correctives against their definitions: hand-computed pairs, exact Gaussian fields, inverted marginal variances."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import optimize
from toys import PATHS, GaussianFlow, alpha_sigma, normals, path_coefficients, uniforms

from mixflow_core.correctives import (
    SamplingCorrective,
    TrainingCorrective,
    coupled_time,
    epsilon_scaled,
    perturb_input,
    roll_out_one_step,
)
from mixflow_core.interpolant import Interpolant
from mixflow_core.mixture import SlowedMixture
from mixflow_core.samplers import CountedField, Sampler, time_grid

B = 50
X0, X1, NOISE, U = normals(1, B, 3), normals(2, B, 3), normals(3, B, 3), uniforms(4, B, 2)
LINEAR = Interpolant("linear")
FLOW = GaussianFlow("linear", mean=0.7, sd=0.5)


def pair_of(path="linear", gamma=0.8, target_time="m"):
    mixture = SlowedMixture(time_law="beta", slowing_law="interval", gamma=gamma, target_time=target_time)
    return mixture.pair(Interpolant(path), mixture.draw(U), x0=X0, x1=X1)


def column(t):
    return t.reshape(-1, 1)


def untouched(a, b, *, but=()):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a._fields if name not in but)


# Input Perturbation


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("path", PATHS)
def test_perturbation_makes_the_input_with_more_noise_than_the_target(path, gamma):
    pair = pair_of(path, gamma)
    perturbed = perturb_input(pair, Interpolant(path), noise=NOISE, strength=0.1)
    alpha, sigma = (column(torch.from_numpy(c)) for c in alpha_sigma(path, pair.m.numpy()))
    torch.testing.assert_close(perturbed.x_m, alpha * X1 + sigma * (X0 + 0.1 * NOISE), rtol=0, atol=1e-12)
    assert untouched(pair, perturbed, but=("x_m",))


def test_perturbed_inputs_have_the_noise_of_a_larger_schedule():
    # As its authors put it: the noise schedule is sqrt(1 + gamma^2) times larger.
    x0, noise, t = normals(5, 400_000, 1), normals(6, 400_000, 1), torch.full((400_000,), 0.3, dtype=torch.float64)
    mixture = SlowedMixture(time_law="beta", slowing_law="interval", gamma=0.0, target_time="m")
    pair = mixture.pair(LINEAR, mixture.draw(torch.stack([t**2, t], 1)), x0=x0, x1=torch.zeros_like(x0))
    assert float(perturb_input(pair, LINEAR, noise=noise, strength=0.5).x_m.std()) == pytest.approx(
        0.7 * 1.25**0.5, rel=0.005
    )


# One-step self-rollout


def affine(x, t):
    """A wrong field whose step can be taken by hand."""
    return 2 * x + column(t)


ALL = torch.ones(B, dtype=torch.bool)


def test_a_rolled_state_is_one_euler_step_of_the_model_by_hand():
    mixture = SlowedMixture(time_law="beta", slowing_law="interval", gamma=0.5, target_time="m")
    u = torch.tensor([[0.64, 0.5], [0.01, 0.0]], dtype=torch.float64)  # t = 0.8, m = 0.6; t = m = 0.1
    pair = mixture.pair(LINEAR, mixture.draw(u), x0=torch.full((2, 1), 2.0).double(), x1=torch.ones(2, 1).double())
    rolled = roll_out_one_step(pair, LINEAR, affine, step=0.2, replaced=torch.tensor([True, True]))
    # s = 0.4: x_s = 0.4 * 1 + 0.6 * 2 = 1.6, u = 3.6, x = 1.6 + 0.2 * 3.6; s = 0: x_s = 2, u = 4, x = 2 + 0.1 * 4
    torch.testing.assert_close(rolled.x_m[:, 0], torch.tensor([2.32, 2.4], dtype=torch.float64), rtol=0, atol=1e-12)
    assert untouched(pair, rolled, but=("x_m",))


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_a_field_that_knows_the_pair_rolls_out_the_interpolation_itself(gamma):
    pair = pair_of(gamma=gamma)
    rolled = roll_out_one_step(pair, LINEAR, lambda x, t: X1 - X0, step=0.25, replaced=ALL)
    torch.testing.assert_close(rolled.x_m, pair.x_m, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_the_model_is_told_where_the_step_starts(path):
    pair, told = pair_of(path, 0.0), []
    flow = GaussianFlow(path, mean=0.7, sd=0.5)
    rolled = roll_out_one_step(
        pair, Interpolant(path), lambda x, t: told.append(t) or flow.field(x, t), step=0.1, replaced=ALL
    )
    s = np.maximum(pair.m.numpy() - 0.1, 0)
    np.testing.assert_allclose(told[0], s, atol=1e-12)
    alpha, sigma = (c[:, None] for c in alpha_sigma(path, s))
    x_s = torch.from_numpy(alpha * X1.numpy() + sigma * X0.numpy())
    expected = x_s + column(pair.m - torch.from_numpy(s)) * flow.field(x_s, torch.from_numpy(s))
    torch.testing.assert_close(rolled.x_m, expected, rtol=0, atol=1e-9)
    assert torch.equal(pair.t, rolled.t)


def test_only_the_chosen_samples_are_replaced():
    pair, chosen = pair_of(), U[:, 0] < 0.3
    rolled = roll_out_one_step(pair, LINEAR, affine, step=0.2, replaced=chosen)
    assert bool((rolled.x_m[chosen] != pair.x_m[chosen]).all())
    assert torch.equal(rolled.x_m[~chosen], pair.x_m[~chosen])


def test_a_rollout_starts_no_earlier_than_sampling_does():
    pair = pair_of(gamma=1.0)
    told = []
    rolled = roll_out_one_step(
        pair, LINEAR, lambda x, t: told.append(t) or affine(x, t), step=0.5, replaced=ALL, start=0.2
    )
    before = pair.m <= 0.2
    assert int(before.sum()) > 3
    assert torch.equal(rolled.x_m[before], pair.x_m[before])
    np.testing.assert_allclose(told[0], np.minimum(np.maximum(pair.m.numpy() - 0.5, 0.2), pair.m.numpy()), atol=1e-12)


def test_no_gradient_passes_through_the_rollout():
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rolled = roll_out_one_step(pair_of(), LINEAR, lambda x, t: weight * x, step=0.2, replaced=ALL)
    assert not rolled.x_m.requires_grad
    (weight * rolled.x_m - rolled.target).square().sum().backward()
    by_hand = (2 * (2 * rolled.x_m - rolled.target) * rolled.x_m).sum()
    torch.testing.assert_close(weight.grad, by_hand, rtol=1e-12, atol=0)


def test_the_share_grows_from_nothing_to_its_value_and_stays():
    corrective = TrainingCorrective(rollout_share=0.6, rollout_step=0.1, rollout_ramp=0.5)
    shares = [corrective.share_at(progress) for progress in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)]
    assert shares == pytest.approx([0.0, 0.15, 0.3, 0.6, 0.6, 0.6], abs=1e-15)
    assert TrainingCorrective().share_at(0.5) == 0
    with pytest.raises(ValueError, match=r"^progress must lie in \[0, 1\], got 1.5; it is the step over"):
        corrective.share_at(1.5)


def replaced_at(corrective, progress, u):
    pair = pair_of()
    x_m = corrective.apply(pair, LINEAR, lambda x, t: x + 1, progress=progress, u=u).x_m
    return (x_m != pair.x_m).any(1)


def test_the_schedules_ends_replace_none_and_all():
    corrective = TrainingCorrective(rollout_share=1.0, rollout_step=0.3, rollout_ramp=1.0)
    u = torch.linspace(0, 1 - 1e-9, B, dtype=torch.float64)
    assert not replaced_at(corrective, 0.0, u).any()
    assert replaced_at(corrective, 1.0, u).all()
    half = replaced_at(corrective, 0.5, u)
    assert torch.equal(half, torch.arange(B) < B // 2)


def test_training_off_is_the_pair_itself_and_asks_nothing():
    def never(x, t):
        raise AssertionError("an unused field was called")

    pair = pair_of()
    assert TrainingCorrective().is_off
    assert TrainingCorrective().apply(pair, LINEAR, never, progress=0.5) is pair
    perturbed = TrainingCorrective(input_perturbation=0.1).apply(pair, LINEAR, never, progress=0.5, noise=NOISE)
    assert torch.equal(perturbed.x_m, perturb_input(pair, LINEAR, noise=NOISE, strength=0.1).x_m)


def test_both_training_correctives_perturb_the_rolled_state():
    both = TrainingCorrective(input_perturbation=0.2, rollout_share=1.0, rollout_step=0.1, rollout_ramp=0.5)
    assert not both.is_off
    pair = pair_of()
    out = both.apply(pair, LINEAR, affine, progress=0.5, noise=NOISE, u=U[:, 0], start=0.05)
    rolled = roll_out_one_step(pair, LINEAR, affine, step=0.1, replaced=ALL, start=0.05)
    expected = rolled.x_m + column(1 - pair.m) * 0.2 * NOISE
    torch.testing.assert_close(out.x_m, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_perturbation": 0.1}, "noise must be given with input_perturbation, got None"),
        ({"rollout_share": 0.5, "rollout_step": 0.1, "rollout_ramp": 1.0}, "u must be given with rollout_share, got"),
    ],
)
def test_missing_random_numbers_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingCorrective(**settings).apply(pair_of(), LINEAR, affine, progress=0.5)


# Epsilon Scaling


def data_and_noise(flow, x, t):
    """E[x1 | x_t] and E[x0 | x_t] of Gaussian data, from Bayes' rule."""
    alpha, sigma = alpha_sigma(flow.path, t)
    residual = (x - alpha * flow.mean) / (alpha**2 * flow.sd**2 + sigma**2)
    return flow.mean + alpha * flow.sd**2 * residual, sigma * residual


@pytest.mark.parametrize("factor", [1.05, 0.9])
@pytest.mark.parametrize("path", PATHS)
def test_the_scaled_field_has_the_noise_over_the_factor_at_the_same_state(path, factor):
    flow = GaussianFlow(path, mean=0.7, sd=0.5)
    scaled = epsilon_scaled(flow.field, Interpolant(path), lambda t: torch.full_like(t, factor))
    for t in (0.01, 0.3, 0.8, 0.99):
        alpha, sigma, d_alpha, d_sigma = path_coefficients(path, np.float64(t))
        noise = data_and_noise(flow, X0, t)[1] / factor
        data = (X0 - sigma * noise) / alpha
        velocity = scaled(X0, torch.full((B,), t, dtype=torch.float64))
        torch.testing.assert_close(velocity, d_alpha * data + d_sigma * noise, rtol=1e-9, atol=1e-9)


def test_euler_on_the_linear_path_is_ddim_with_scaled_noise():
    factor, states = 1.02, [X0]
    for t, t_next in pairwise(time_grid(8).double().tolist()):
        data, noise = data_and_noise(FLOW, states[-1], t)
        if t > 0:
            noise = noise / factor
            data = (states[-1] - (1 - t) * noise) / t
        states.append(t_next * data + (1 - t_next) * noise)
    sampler = Sampler("euler", 8)
    wrapped = SamplingCorrective(epsilon_scale=factor).wrap(FLOW.field, LINEAR, sampler)
    torch.testing.assert_close(sampler.run(wrapped, X0, LINEAR, None), states[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("path", "unscaled"), [("linear", True), ("gvp", True), ("vp", False)])
def test_pure_noise_is_left_as_it_is_where_alpha_is_zero_and_scaled_where_it_is_not(path, unscaled):
    flow, t = GaussianFlow(path, mean=0.7, sd=0.5), torch.zeros(B, dtype=torch.float64)
    velocity = epsilon_scaled(flow.field, Interpolant(path), lambda t: torch.full_like(t, 1.05))(X0, t)
    assert bool(torch.isfinite(velocity).all())
    assert torch.equal(velocity, flow.field(X0, t)) is unscaled


def factors(sampler, **settings):
    """The factor of every evaluation, read at x = 0 from the field -1.

    There noise = t, so the scaled noise is t / factor, the data it implies -(1 - t) / factor, the velocity -1 / factor.
    """
    wrapped = SamplingCorrective(**settings).wrap(lambda x, t: -torch.ones_like(x), LINEAR, sampler)
    found = []

    def read(x, t):
        found.append(float(-1 / wrapped(torch.zeros_like(x), t)[0, 0]))
        return FLOW.field(x, t)

    sampler.run(read, X0, LINEAR, lambda k: normals(k, *X0.shape))
    return found


@pytest.mark.parametrize(
    ("sampler", "left"),
    [
        (Sampler("euler", 5), [None, 4, 3, 2, 1]),
        (Sampler("euler", 3, shift=3.0, start=0.1, end=0.9), [3, 2, 1]),
        (Sampler("heun", 3), [None, 2, 2, 1, 1, 0]),
        (Sampler("sde", 4), [None, 3, 2, 1]),
        (Sampler("sde", 3, last_step="none", end=0.9), [None, 2, 1]),
        (Sampler("sde_heun", 3), [None, 2, 2, 1, 1]),
    ],
)
def test_the_factor_counts_the_steps_that_are_left(sampler, left):
    found = factors(sampler, epsilon_scale=1.01, epsilon_growth=0.02)
    expected = [1.0 if n is None else 1.01 + 0.02 * n for n in left]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_uniform_schedule_is_one_factor():
    found = factors(Sampler("euler", 6, start=0.1), epsilon_scale=1.017)
    assert found == pytest.approx([1.017] * 6, abs=1e-12)


def test_growth_alone_scales_too():
    assert factors(Sampler("euler", 4), epsilon_growth=0.01) == pytest.approx([1.0, 1.03, 1.02, 1.01], abs=1e-12)


# Time-Shift Sampler


def states_of_variance(variances):
    """One state (2, 4, 4) for each variance, which is exactly that of its values."""
    x = normals(8, len(variances), 32).numpy()
    x = (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True)
    return torch.from_numpy(x * np.sqrt(variances)[:, None] + 0.3).reshape(-1, 2, 4, 4)


def marginal_variance(path, t, data_variance):
    alpha, sigma = alpha_sigma(path, t)
    return alpha**2 * data_variance + sigma**2


@pytest.mark.parametrize(("path", "data_variance"), [("linear", 0.0), ("linear", 0.2), ("gvp", 0.3), ("vp", 0.0)])
def test_the_coupled_time_has_the_states_variance(path, data_variance):
    t, wanted = 0.5, np.array([0.42, 0.47, 0.53, 0.58])
    x = states_of_variance(marginal_variance(path, wanted, data_variance))
    times = torch.full((4,), t, dtype=torch.float64)
    found = coupled_time(x, times, Interpolant(path), window=0.2, data_variance=data_variance)
    np.testing.assert_allclose(found, wanted, atol=5.1e-4)  # candidates are a thousandth apart
    # and it is where the published criterion puts it: the root of the variance's difference
    for state, time in zip(x.numpy(), found.tolist(), strict=True):
        variance = state.var(ddof=1)
        root = optimize.brentq(lambda s, v=variance: marginal_variance(path, s, data_variance) - v, 0.4, 0.6)
        assert time == pytest.approx(root, abs=5.1e-4)


def test_the_window_bounds_the_shift_and_the_interval_the_window():
    x = states_of_variance(np.array([100.0, 1e-6, 100.0, 1e-6]))
    t = torch.tensor([0.5, 0.5, 0.02, 0.97], dtype=torch.float64)
    found = coupled_time(x, t, LINEAR, window=0.1, interval=(0.001, 0.99))
    np.testing.assert_allclose(found, [0.45, 0.55, 0.001, 0.99], atol=1e-12)


def test_candidates_are_the_thousandths_around_the_time():
    wanted = np.array([0.497, 0.498, 0.499, 0.5, 0.501, 0.502, 0.503])
    x, t = states_of_variance((1 - wanted) ** 2), torch.full((7,), 0.5, dtype=torch.float64)
    np.testing.assert_allclose(coupled_time(x, t, LINEAR, window=0.004), wanted.clip(0.498, 0.502), atol=1e-9)


def told_times(sampler, interpolant=LINEAR, x=None, **settings):
    """(the sampler's time, what the network was told) of every evaluation: the states stay as they are."""
    told, asked = [], []
    x = states_of_variance(np.array([0.3, 0.6])) if x is None else x

    def network(x, t):
        told.append(t)
        return torch.zeros_like(x)

    wrapped = SamplingCorrective(**settings).wrap(network, interpolant, sampler)

    def field(x, t):
        asked.append(float(t[0]))
        return wrapped(x, t)

    sampler.run(field, x, interpolant, lambda k: torch.zeros_like(x))
    return np.array(asked), torch.stack(told).numpy()


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_network_is_told_the_coupled_time_after_the_first_evaluation_and_before_the_cutoff(method):
    asked, told = told_times(Sampler(method, 10), time_shift_window=0.3, time_shift_cutoff=0.6)
    expected = np.repeat(asked[:, None], 2, 1)
    inside = (asked > 0) & (asked < np.float32(0.6))
    like = 1 - np.sqrt([0.3, 0.6])
    expected[inside] = np.clip(like, asked[inside, None] - 0.15, asked[inside, None] + 0.15).clip(0, 1)
    assert inside.sum() == {"euler": 5, "heun": 10}[method]
    np.testing.assert_allclose(told[inside], expected[inside], atol=5.1e-4)
    np.testing.assert_array_equal(told[~inside], expected[~inside])


def test_the_cutoff_itself_is_not_shifted():
    asked, told = told_times(Sampler("euler", 4), time_shift_window=0.2, time_shift_cutoff=0.5)
    assert (told != asked[:, None]).any(1).tolist() == [False, True, False, False]


def test_the_window_keeps_to_the_samplers_ends():
    x = states_of_variance(np.array([100.0, 100.0]))
    sampler = Sampler("euler", 10, start=0.05, end=0.9)
    _, told = told_times(sampler, x=x, time_shift_window=1.0, time_shift_cutoff=0.9)
    assert told[1:].min() == pytest.approx(0.05, abs=1e-7)
    _, told = told_times(sampler, x=1e-3 * x, time_shift_window=1.0, time_shift_cutoff=0.9)
    assert told[1:].max() == pytest.approx(0.9, abs=1e-7)


def test_data_variance_reaches_the_criterion():
    x = states_of_variance(marginal_variance("linear", np.array([0.25, 0.4]), 0.2))
    _, told = told_times(
        Sampler("euler", 3), x=x, time_shift_window=0.4, time_shift_cutoff=0.5, data_variance=0.2
    )  # fmt: skip
    np.testing.assert_allclose(told[1], [0.25, 0.4], atol=5.1e-4)


def test_a_shifted_step_is_ddim_from_the_shifted_time():
    # The published version for ADM steps from t_s to t_s + h; on the linear path the velocity told t_s does the same.
    x, t, h = states_of_variance(np.array([0.4, 0.5])), 0.5, 0.1
    wrapped = SamplingCorrective(time_shift_window=0.4, time_shift_cutoff=0.9).wrap(
        FLOW.field, LINEAR, Sampler("euler", 10)
    )
    stepped = x + h * wrapped(x, torch.full((2,), t, dtype=torch.float64))
    for state, variance, out in zip(x, (0.4, 0.5), stepped, strict=True):
        offsets = np.arange(-200, 201) / 1000
        s = t + offsets[np.abs((1 - t - offsets) ** 2 - variance).argmin()]
        data, noise = data_and_noise(FLOW, state, s)
        torch.testing.assert_close(out, (s + h) * data + (1 - s - h) * noise, rtol=0, atol=1e-9)


# Both, neither, and with every sampler


SAMPLERS = [Sampler("euler", 7), Sampler("heun", 4), Sampler("sde", 7), Sampler("sde_heun", 5, last_step="tweedie")]
BOTH = {"epsilon_scale": 1.02, "epsilon_growth": -0.001, "time_shift_window": 0.2, "time_shift_cutoff": 0.8}


def sample(sampler, field):
    return sampler.run(field, X0, LINEAR, lambda k: normals(k, *X0.shape))


@pytest.mark.parametrize("sampler", [*SAMPLERS, Sampler("dopri5", 1)], ids=lambda s: s.name)
def test_off_is_the_plain_sampler_bit_for_bit(sampler):
    off = SamplingCorrective()
    assert off.is_off
    assert off.wrap(affine, LINEAR, sampler) is affine
    assert torch.equal(sample(sampler, off.wrap(FLOW.field, LINEAR, sampler)), sample(sampler, FLOW.field))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_every_fixed_step_sampler_takes_each_and_both_and_spends_the_same(sampler):
    plain = CountedField(FLOW.field)
    outs = [sample(sampler, plain)]
    for keys in (("epsilon_scale", "epsilon_growth"), ("time_shift_window", "time_shift_cutoff"), tuple(BOTH)):
        corrective, counted = SamplingCorrective(**{key: BOTH[key] for key in keys}), CountedField(FLOW.field)
        assert not corrective.is_off
        outs.append(sample(sampler, corrective.wrap(counted, LINEAR, sampler)))
        assert counted.nfe == plain.nfe
    assert all(bool(torch.isfinite(out).all()) for out in outs)
    assert len({float(out.sum()) for out in outs}) == 4


def test_together_the_shifted_velocity_has_its_noise_scaled_at_the_samplers_time():
    sampler, told = Sampler("euler", 10), []

    def network(x, t):
        told.append(t)
        return FLOW.field(x, t)

    wrapped = SamplingCorrective(**BOTH).wrap(network, LINEAR, sampler)
    x, t = states_of_variance(np.array([0.4, 0.55])), 0.3
    velocity = wrapped(x, torch.full((2,), t, dtype=torch.float64))
    np.testing.assert_allclose(told[0], 1 - np.sqrt([0.4, 0.55]).clip(0.6, 0.8), atol=5.1e-4)
    factor = 1.02 - 0.001 * 7  # 0.3 is the fourth of ten steps: 7 are left
    noise = (x - t * FLOW.field(x, told[0])) / factor
    torch.testing.assert_close(velocity, (x - (1 - t) * noise) / t - noise, rtol=0, atol=1e-9)


def test_adaptive_steps_are_refused():
    for settings in ({"epsilon_scale": 1.02}, {"time_shift_window": 0.1, "time_shift_cutoff": 0.5}):
        with pytest.raises(ValueError, match=r"^method must have fixed steps, got 'dopri5'; choose euler, heun"):
            SamplingCorrective(**settings).wrap(FLOW.field, LINEAR, Sampler("dopri5", 1))


# Settings


SHIFT = {"time_shift_window": 0.1, "time_shift_cutoff": 0.5}


@pytest.mark.parametrize(
    ("settings", "sampler", "path", "message"),
    [
        (
            {"epsilon_scale": 1.0, "epsilon_growth": -0.1}, Sampler("euler", 10), "linear",
            "epsilon_scale + epsilon_growth * num_steps must be above 0, got 0",
        ),
        (
            {"time_shift_window": 0.1, "time_shift_cutoff": 0.25}, Sampler("euler", 4), "linear",
            "time_shift_cutoff must lie above the second time of the sampler, 0.25, or nothing is shifted, got 0.25",
        ),
        (
            {"time_shift_window": 0.1, "time_shift_cutoff": 0.5, "data_variance": 1.0}, Sampler("euler", 4), "gvp",
            "data_variance must not be 1 on gvp, where all times then have variance 1; 0 is as published",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_with_a_sampler_is_refused(settings, sampler, path, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SamplingCorrective(**settings).wrap(FLOW.field, Interpolant(path), sampler)


def test_data_of_variance_one_has_times_apart_on_the_linear_path():
    x = states_of_variance(marginal_variance("linear", np.array([0.25, 0.35]), 1.0))
    _, told = told_times(Sampler("euler", 3), x=x, **SHIFT | {"time_shift_window": 0.3, "data_variance": 1.0})
    np.testing.assert_allclose(told[1], [0.25, 0.35], atol=5.1e-4)


def test_a_single_value_has_no_variance():
    with pytest.raises(ValueError, match=r"^x must have at least 2 values a sample .* got shape \(4, 1\)$"):
        coupled_time(torch.zeros(4, 1), torch.zeros(4), LINEAR, window=0.1)


ROLL = {"rollout_share": 0.5, "rollout_step": 0.1, "rollout_ramp": 0.5}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SamplingCorrective, {"epsilon_scale": 0.0}, "epsilon_scale must be above 0, got 0.0"),
        (SamplingCorrective, {"epsilon_scale": float("nan")}, "epsilon_scale must be above 0, got nan"),
        (SamplingCorrective, {"epsilon_growth": float("inf")}, "epsilon_growth must be finite, got inf"),
        (SamplingCorrective, SHIFT | {"time_shift_window": 1.1}, "time_shift_window must lie in [0, 1], got 1.1"),
        (SamplingCorrective, {"time_shift_window": 0.1}, "time_shift_cutoff must lie in (0, 1] with time_shift_window"),
        (SamplingCorrective, SHIFT | {"time_shift_cutoff": 1.5}, "time_shift_cutoff must lie in (0, 1] with"),
        (
            SamplingCorrective,
            {"time_shift_cutoff": 0.5},
            "time_shift_cutoff must be left out without time_shift_window",
        ),
        (SamplingCorrective, SHIFT | {"data_variance": -0.1}, "data_variance must be at least 0, got -0.1"),
        (SamplingCorrective, {"data_variance": 0.5}, "data_variance must be left out without time_shift_window"),
        (TrainingCorrective, {"input_perturbation": -0.1}, "input_perturbation must be at least 0, got -0.1"),
        (TrainingCorrective, {"input_perturbation": float("inf")}, "input_perturbation must be at least 0, got inf"),
        (TrainingCorrective, ROLL | {"rollout_share": 1.1}, "rollout_share must lie in [0, 1], got 1.1"),
        (TrainingCorrective, ROLL | {"rollout_step": 0.0}, "rollout_step must lie in (0, 1] with rollout_share, got 0"),
        (
            TrainingCorrective,
            ROLL | {"rollout_ramp": 1.5},
            "rollout_ramp must lie in (0, 1] with rollout_share, got 1.5",
        ),
        (TrainingCorrective, {"rollout_ramp": 0.5}, "rollout_ramp must be left out without rollout_share, got 0.5"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(kind, settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        kind(**settings)
    assert "\n" not in str(error.value)


def test_every_setting_changes_the_name_and_the_name_fits_a_metric_key():
    changes = [
        {}, {"epsilon_scale": 1.005}, {"epsilon_growth": -1e-05}, SHIFT, SHIFT | {"time_shift_window": 0.2},
        SHIFT | {"time_shift_cutoff": 0.75}, SHIFT | {"data_variance": 0.25}, BOTH,
    ]  # fmt: skip
    assert {key for change in changes for key in change} == {f.name for f in dataclasses.fields(SamplingCorrective)}
    names = [SamplingCorrective(**change).name for change in changes]
    assert len(set(names)) == len(names)
    assert names[:2] == ["", "-es1.005"]
    assert names[-1] == "-es1.02-k-0.001-ts0.2to0.8"
    assert all(re.fullmatch(r"[\w\-./ ]*", name) for name in names)


@pytest.mark.parametrize("kind", [SamplingCorrective, TrainingCorrective])
def test_a_recipe_with_a_slip_is_refused_by_name(kind):
    name = dataclasses.fields(kind)[0].name
    assert TypeAdapter(kind).validate_json("{}") == kind()
    for slip, where in (({"epsilon_scal": 1.0}, "epsilon_scal"), ({name: True}, name), ({name: "1"}, name)):
        with pytest.raises(ValidationError) as error:
            TypeAdapter(kind).validate_json(json.dumps(slip))
        assert [e["loc"] for e in error.value.errors()] == [(where,)]
