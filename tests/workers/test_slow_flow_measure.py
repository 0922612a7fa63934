"""Slow Flow measured on fields whose lag is known, and on a network."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from toys import GaussianFlow
from worker_toys import local_io, pixels, run_config

from mixflow_core.exact import EmpiricalField
from mixflow_core.interpolant import Interpolant
from mixflow_core.samplers import CountedField, Sampler
from workers import slow_flow
from workers.data import ImageSet, digits
from workers.models.sit import SiT
from workers.slow_flow import measure_slow_flow, train_probe
from workers.train import post_train

CPU = torch.device("cpu")
EULER, SDE = Sampler("euler", 20), Sampler("sde", 8, last_step="none", end=0.96)
ODE_TIMES = [i / 10 for i in range(1, 11)]


def one_image_a_class() -> ImageSet:
    data = pixels(10)
    return ImageSet(data.images, np.arange(10)[::-1].copy())


class Lagging(nn.Module):
    """Leads from noise straight to the class's only image at `pace` times the true speed: m_t = pace t exactly."""

    def __init__(self, data: ImageSet, pace: float) -> None:
        super().__init__()
        self.images, self.pace = data.x1(np.argsort(data.labels)), pace

    def forward(self, x, t, y):
        return self.pace * (self.images[y] - x) / (1 - self.pace * t)[:, None, None, None]


class Brightness(nn.Module):
    """A probe whose reading is known: the mean of the image."""

    def forward(self, x):
        return x.flatten(1).mean(1)


@pytest.mark.parametrize(("pairs", "expected"), [(5, [0, 8, 16, 24, 32]), (80, list(range(40)) * 2)])
def test_fewer_pairs_than_classes_are_of_classes_from_all_over(monkeypatch, pairs, expected):
    """Of the first classes alone the numbers would speak of these."""
    asked = []

    def chosen(data, labels, seed):
        asked.append(labels.tolist())
        raise KeyError("enough")

    monkeypatch.setattr("workers.slow_flow._same_class", chosen)
    images = np.zeros((40, 1, 8, 8), np.uint8)
    with pytest.raises(KeyError):
        measure(None, data=ImageSet(images, np.arange(40)), num_samples=pairs)
    assert asked == [expected]


def measure(model, probe=None, data=None, seed=2, num_samples=40, samplers=(EULER,), batch_size=250, **run):
    """With the model's own error-free field where there are few images."""
    return measure_slow_flow(
        model,
        run_config().model_copy(update=run),
        data or one_image_a_class(),
        probe or Brightness(),
        samplers,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        device=CPU,
    )


def first(found, of="model"):
    return next(iter(found["samplers"].values()))[of]


@pytest.mark.parametrize("pace", [0.5, 0.9, 0.999])
def test_a_field_of_known_lag_is_measured(pace):
    found = first(measure(Lagging(one_image_a_class(), pace)))
    assert [share for share, *_ in found["slowed"]] == [1.0] * 10
    assert found["same_class"]["times"] == pytest.approx(ODE_TIMES)
    assert found["same_class"]["levels"] == [0.05, 0.25, 0.5, 0.75, 0.95]
    for t, row in zip(ODE_TIMES, found["same_class"]["values"], strict=True):
        assert row == pytest.approx([pace * t] * 5, abs=1e-5)


def test_a_field_that_hurries_is_not_called_slow():
    """From t = 1 / 1.05 on, the state has passed the image; m_t = 1.05 t leaves [0, 1]."""

    class Hurrying(Lagging):
        def forward(self, x, t, y):
            return self.pace * (self.images[y] - x) / (1 - self.pace * t + 1e-12)[:, None, None, None]

    found = first(measure(Hurrying(one_image_a_class(), 1.03)))
    assert [share for share, *_ in found["slowed"]] == [0.0] * 10
    assert found["same_class"]["values"][-1] == pytest.approx([1.03] * 5, abs=1e-3)


def test_the_probe_is_read_on_generated_minus_true_states():
    """With pace c the state at t is the true one at c t: it is darker by (1 - c) t times the images' brightness."""
    dark, pace = one_image_a_class(), 0.5
    data = ImageSet(dark.images // 8 + 220, dark.labels)
    found = first(measure(Lagging(data, pace), data=data, num_samples=400))
    assert found["probe"]["times"] == pytest.approx(ODE_TIMES)
    brightness = data.x1(slice(None)).mean().item()
    assert brightness > 0.8
    for t, row, lag in zip(ODE_TIMES, found["probe"]["values"], found["probe_lag"], strict=True):
        assert row[2] == pytest.approx(-(1 - pace) * t * brightness, abs=0.03)  # the noise's mean adds 0.006 of spread
        assert row[0] < row[1] < row[2] < row[3] < row[4]
        # Paired with the same noise, only its part (1 - c) t of the spread is left.
        assert lag[0] == pytest.approx(-(1 - pace) * t * brightness, abs=0.03)
        assert lag[2] - lag[1] < 0.03


def test_an_sdes_states_are_read_at_its_times_and_a_last_step_is_one_of_them():
    closing = Sampler("sde", 5)
    found = measure(Lagging(one_image_a_class(), 0.9), samplers=(SDE, closing))["samplers"]
    assert found[SDE.name]["model"]["same_class"]["times"] == pytest.approx([0.96 * i / 8 for i in range(1, 9)])
    assert found[closing.name]["model"]["same_class"]["times"] == pytest.approx([0.24, 0.48, 0.72, 0.96, 1])
    assert np.isfinite(found[SDE.name]["model"]["probe"]["values"]).all()
    starts = [part["from"] for part in found[SDE.name]["model"]["continuation"]]
    assert starts == pytest.approx([0.36, 0.6])
    assert found[closing.name]["model"]["continuation"][0]["times"] == pytest.approx([0.72, 0.96, 1])


# ------------------------------------------------------------------------- Gaussian data, where all is in closed form

SD, DIMENSIONS = 0.5, 64


@pytest.fixture
def no_error_free_field(monkeypatch):
    """Of thousands of images it takes a minute, and here the model's is known to be without error."""
    monkeypatch.setattr(slow_flow, "MOST_NUMBERS", 1000)


class GaussianField(nn.Module):
    """The error-free field of N(0, sd^2) data, as a model that no label concerns."""

    def __init__(self, path: str = "linear", sd: float = SD) -> None:
        super().__init__()
        self.flow = GaussianFlow(path, mean=0.0, sd=sd)

    def forward(self, x, t, y):
        return self.flow.field(x, t)


def gaussian_images(sd: float, n: int = 4000) -> ImageSet:
    images = sd * np.random.default_rng(1).standard_normal((n, 1, 8, 8))
    return ImageSet(images.astype(np.float32), np.zeros(n, np.int64))


def growth(times):
    """By how much Euler's method multiplies x between these times: the product of 1 + h c(t), where u(x, t) = c x."""
    rates = [(t * SD**2 - (1 - t)) / (t**2 * SD**2 + (1 - t) ** 2) for t in times[:-1]]
    return np.prod([1 + (b - a) * c for a, b, c in zip(times[:-1], times[1:], rates, strict=True)])


@pytest.fixture(scope="module")
def gaussian():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow_flow, "MOST_NUMBERS", 1000)
        found = measure(GaussianField(), data=gaussian_images(SD), num_samples=4000, samplers=(Sampler("euler", 40),))
    assert "4,000 images of 64 are more" in first(found, "error_free")
    return first(found)


def test_both_pairings_agree_with_the_closed_form_of_gaussian_data(gaussian):
    """m_t of the continuation from s, in closed form; s = 0 is the rollout.

    The field c(t) x is linear, so the state is G x_s with a number G (`growth`). With w = x1 - x0, x_s = x0 + s w and
    m = <G x_s - x0, w> / |w|^2 = G s + (G - 1) <x0, w> / |w|^2. Given w, x0 is normal with mean -w / (1 + sd^2) and
    variance sd^2 / (1 + sd^2), and |w|^2 / (1 + sd^2) is chi-squared with D degrees of freedom, independent of the
    part of x0 across: <x0, w> / |w|^2 = -1 / (1 + sd^2) + sd / (1 + sd^2) T / sqrt(D) with T of Student's law.
    """
    whole = np.linspace(0, 1, 41)
    for part in ({"from": 0.0, **gaussian["same_class"]}, *gaussian["continuation"]):
        s = part["from"]
        for t, levels, low, high in zip(part["times"], part["values"], part["low"], part["high"], strict=True):
            factor = growth(whole[(whole > s - 1e-6) & (whole < t + 1e-6)])
            student = stats.t(DIMENSIONS).ppf(part["levels"]) / np.sqrt(DIMENSIONS)
            expected = np.sort(factor * s + (1 - factor) * (1 - SD * student) / (1 + SD**2))
            np.testing.assert_allclose(levels, expected, rtol=0.01)
            assert (np.array(low) < expected + 0.01).all()
            assert (np.array(high) > expected - 0.01).all()


def test_the_intervals_cover_the_closed_form(gaussian):
    inside = []
    for part in (gaussian["same_class"], *gaussian["continuation"]):
        s = part.get("from", 0.0)
        whole = np.linspace(0, 1, 41)
        for t, low, high in zip(part["times"], part["low"], part["high"], strict=True):
            factor = growth(whole[(whole > s - 1e-6) & (whole < t + 1e-6)])
            median = factor * s + (1 - factor) / (1 + SD**2)
            inside.append(low[2] <= median <= high[2])
    assert np.mean(inside) > 0.7, "at one time all share their luck, so not nearly 95 % each time"


def test_the_velocity_deficit_agrees_with_the_closed_form_of_gaussian_data(gaussian):
    """E|u|^2 = c^2 Var(x), Var(x) = growth^2 on generated states, t^2 sd^2 + (1 - t)^2 on true; E|v|^2 = 1 + sd^2."""
    whole = np.linspace(0, 1, 41)
    assert gaussian["deficit_times"] == pytest.approx([0, *ODE_TIMES[:-1]])
    for t, generated, true in zip(
        gaussian["deficit_times"], gaussian["deficit_generated"], gaussian["deficit_true"], strict=True
    ):
        variance = t**2 * SD**2 + (1 - t) ** 2
        c = (t * SD**2 - (1 - t)) / variance
        made = growth(whole[whole < t + 1e-6]) ** 2
        for found, its in ((generated, made), (true, variance)):
            assert 1 - found[0] == pytest.approx(c**2 * its / (1 + SD**2), rel=0.01, abs=1e-4)
            assert found[1] <= found[0] <= found[2]


@pytest.mark.parametrize(("method", "error"), [("heun", 0.01), ("dopri5", 0.06)])
def test_other_samplers_are_read_on_their_own_times(method, error, no_error_free_field):
    """They follow the exact flow, whose state at t is x0 times the marginal's deviation.

    dopri5's published tolerances leave an error of 5 % of a state here.
    """
    steps = 40 if method == "heun" else 1
    found = measure(GaussianField(), data=gaussian_images(SD), num_samples=2000, samplers=(Sampler(method, steps),))
    part, flow = first(found)["same_class"], GaussianFlow("linear", mean=0.0, sd=SD)
    assert part["times"] == pytest.approx(ODE_TIMES)
    for t, row in zip(part["times"], part["values"], strict=True):
        assert row[2] == pytest.approx((1 - flow.marginal(t)[1]) / (1 + SD**2), rel=error)


@pytest.mark.parametrize(
    "sampler", [Sampler("heun", 4), Sampler("dopri5", 1), Sampler("sde_heun", 4, last_step="none")]
)
def test_a_sampler_that_asks_for_the_field_at_the_data_end_has_no_error_free_one(sampler):
    assert "no finite value at t = 1" in first(measure(lambda x, t, y: -x, samplers=(sampler,)), "error_free")


@pytest.mark.parametrize("path", ["gvp", "vp"])
def test_on_curved_paths_a_continued_state_that_stands_still_stays_at_its_time(path, no_error_free_field):
    """Of N(0, 1) data the marginals of these paths are all N(0, 1) and the field is 0: m_t = s at every t > s."""
    sampler = Sampler("euler", 20, end=0.99)
    found = first(measure(GaussianField(path, 1.0), data=gaussian_images(1.0), samplers=(sampler,), path=path))
    assert len(found["continuation"]) == 2
    for part in found["continuation"]:
        np.testing.assert_allclose(part["values"], part["from"], atol=2e-6)
    assert [d[0] for d in found["deficit_generated"]] == pytest.approx([1.0] * 10, abs=1e-6)


# ---------------------------------------------------------------------------------------------- the error-free field


@pytest.mark.parametrize("sampler", [EULER, SDE, Sampler("euler", 8, guidance_scale=2.0)])
def test_a_model_that_is_the_error_free_field_is_measured_as_it(sampler):
    data = pixels(30)
    exact = EmpiricalField(data.x1(slice(None)), torch.from_numpy(data.labels), Interpolant("linear"), null_label=10)
    found = measure(exact, data=data, samplers=(sampler,))["samplers"][sampler.name]
    assert found["model"] == found["error_free"]


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_whatever_the_model_predicts_the_error_free_field_is_the_velocity(prediction):
    data, sampler = pixels(30), Sampler("euler", 10, start=0.001, end=0.999)
    exact = EmpiricalField(data.x1(slice(None)), torch.from_numpy(data.labels), Interpolant("linear"))
    path = Interpolant("linear")

    def predict(x, t, y):
        convert = path.noise_from_velocity if prediction == "noise" else path.data_from_velocity
        return convert(exact(x.double(), t.double(), y), x=x.double(), t=t.double()).float()

    found = measure(predict, data=data, samplers=(sampler,), prediction=prediction)["samplers"][sampler.name]
    np.testing.assert_allclose(
        found["model"]["same_class"]["values"], found["error_free"]["same_class"]["values"], atol=2e-3
    )


def test_the_error_free_field_ends_on_an_image_and_its_deficit_is_that_of_true_states():
    """One image a class: no posterior variance, so no lag, no deficit and no loss on a continued pair."""
    error_free = first(measure(Lagging(one_image_a_class(), 0.5)), "error_free")
    np.testing.assert_allclose([row[2] for row in error_free["same_class"]["values"]], ODE_TIMES, atol=1e-5)
    np.testing.assert_allclose([lag for lag, *_ in error_free["probe_lag"]], 0, atol=1e-5)
    for part in error_free["continuation"]:
        np.testing.assert_allclose([row[2] for row in part["values"]], part["times"], atol=1e-5)
    np.testing.assert_allclose([d[0] for d in error_free["deficit_generated"]], 0, atol=1e-5)


def test_what_is_left_out_says_why(monkeypatch):
    auto = Sampler("euler", 4, guidance_scale=2.0, guidance="autoguidance")
    model = Lagging(one_image_a_class(), 0.9)
    found = measure_slow_flow(
        model, run_config(), one_image_a_class(), Brightness(), (auto,),
        num_samples=10, batch_size=10, seed=0, device=CPU, guide=model,
    )  # fmt: skip
    assert "no error-free counterpart" in first(found, "error_free")
    monkeypatch.setattr(slow_flow, "MOST_NUMBERS", 639)
    assert first(measure(model), "error_free").endswith("at most 639 numbers; 10 images of 64 are more")


# -------------------------------------------------------------------------------------------------------- its cost


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [(EULER, 20 + 13 + 7 + 10), (SDE, 8 + 5 + 3 + 8), (Sampler("heun", 125), 250 + 166 + 84 + 10)],
)
def test_the_network_evaluations_of_a_pair(sampler, evaluations):
    """Of the rollout and of what is left after a third and two thirds of the steps; one more at each reading time."""
    counted = CountedField(lambda x, t, y: torch.zeros_like(x))
    measure(counted, num_samples=10, samplers=(sampler,), batch_size=10)
    assert counted.nfe == evaluations


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_no_pair(batch_size):
    found = [measure(Lagging(one_image_a_class(), 0.9), samplers=(SDE,), batch_size=b) for b in (batch_size, 40)]
    a, b = (np.array(first(one)["same_class"]["values"]) for one in found)
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture(scope="module")
def briefly_trained(tmp_path_factory):
    data, run = digits(8, 597), run_config(steps=200, log_every=100, checkpoint_every=200, global_batch_size=64)
    torch.set_num_threads(1)
    state = post_train(run, data["train"], data["held_out"], local_io(tmp_path_factory.mktemp("run")))
    model = SiT(run.model)
    model.load_state_dict(state.ema)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow_flow, "PROBE_STEPS", 200)  # a third of the real one's, enough to be right
        probe = train_probe("linear", data["train"])
    return model, data["train"], probe


def test_a_briefly_trained_network_flows_slowly(briefly_trained):
    model, data, probe = briefly_trained
    found = measure(model, probe, data, num_samples=200)
    assert json.loads(json.dumps(found)) == found
    assert (found["num_samples"], found["num_images"]) == (200, 1200)
    assert 0.6 < first(found)["slowed"][-1][0] <= 1
    medians = [row[2] for row in first(found)["same_class"]["values"]]
    assert medians[0] < medians[3] < medians[6], "it does flow"
    assert medians[-1] < 0.95
    assert measure(model, probe, data, num_samples=200) == found, "it repeats exactly"
    assert measure(model, probe, data, num_samples=200, seed=3) != found


def test_the_probe_reads_the_time_of_true_interpolations(briefly_trained):
    _, data, probe = briefly_trained
    numbers = torch.Generator().manual_seed(5)
    x1, t = data.x1(slice(0, 500)), torch.rand(500, generator=numbers)
    where = t[:, None, None, None]
    with torch.no_grad():
        read = probe(where * x1 + (1 - where) * torch.randn(x1.shape, generator=numbers))
    assert (read - t).abs().mean().item() < 0.08, "guessing 1/2 is wrong by 0.25 on average"


def test_training_the_probe_repeats_bit_for_bit(monkeypatch):
    monkeypatch.setattr(slow_flow, "PROBE_STEPS", 20)
    first = train_probe("gvp", pixels()).state_dict()
    torch.manual_seed(77)
    again, other = train_probe("gvp", pixels()).state_dict(), train_probe("linear", pixels()).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.2.weight"], other["head.2.weight"])
