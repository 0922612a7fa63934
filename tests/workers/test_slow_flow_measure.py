"""Slow Flow measured on fields whose lag is known, and on a network."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from worker_toys import local_io, pixels, run_config

from workers import slow_flow
from workers.data import ImageSet, digits
from workers.models.sit import SiT
from workers.slow_flow import measure_slow_flow, train_probe
from workers.train import post_train

CPU = torch.device("cpu")
ODE_TIMES = [i / 20 for i in range(1, 21)]
SDE_TIMES = [0.96 * i / 8 for i in range(1, 9)]


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


def measure(model, probe=None, data=None, seed=2, num_samples=40):
    data = data or one_image_a_class()
    return measure_slow_flow(
        model, run_config(), data, probe or Brightness(), num_samples=num_samples, seed=seed, device=CPU
    )


@pytest.mark.parametrize("pace", [0.5, 0.9, 0.999])
def test_a_field_of_known_lag_is_measured(pace):
    found = measure(Lagging(one_image_a_class(), pace))
    assert found["share_slowed"] == 1.0
    assert found["slowed_time"]["times"] == pytest.approx(ODE_TIMES)
    assert found["slowed_time"]["levels"] == [0.05, 0.25, 0.5, 0.75, 0.95]
    for t, row in zip(ODE_TIMES, found["slowed_time"]["values"], strict=True):
        assert row == pytest.approx([pace * t] * 5, abs=1e-5)


def test_a_field_that_hurries_is_not_called_slow():
    """From t = 1 / 1.05 on, the state has passed the image; m_t = 1.05 t leaves [0, 1]."""

    class Hurrying(Lagging):
        def forward(self, x, t, y):
            return self.pace * (self.images[y] - x) / (1 - self.pace * t + 1e-12)[:, None, None, None]

    found = measure(Hurrying(one_image_a_class(), 1.03))
    assert found["share_slowed"] == 0.0
    assert found["slowed_time"]["values"][-1] == pytest.approx([1.03] * 5, abs=1e-3)


def test_the_probe_is_read_on_generated_minus_true_states():
    """With pace c the state at t is the true one at c t: it is darker by (1 - c) t times the images' brightness."""
    dark, pace = one_image_a_class(), 0.5
    data = ImageSet(dark.images // 8 + 220, dark.labels)
    found = measure(Lagging(data, pace), data=data, num_samples=400)["probe_ode"]
    assert found["times"] == pytest.approx(ODE_TIMES)
    brightness = data.x1(slice(None)).mean().item()
    assert brightness > 0.8
    for t, row in zip(found["times"], found["values"], strict=True):
        assert row[2] == pytest.approx(-(1 - pace) * t * brightness, abs=0.03)  # the noise's mean adds 0.006 of spread
        assert row[0] < row[1] < row[2] < row[3] < row[4]


def test_sde_states_are_read_before_the_last_step():
    found = measure(Lagging(one_image_a_class(), 0.9))["probe_sde"]
    assert found["times"] == pytest.approx(SDE_TIMES)
    assert np.isfinite(found["values"]).all()


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
    assert found["num_samples"] == 200
    assert 0.6 < found["share_slowed"] <= 1
    medians = [row[2] for row in found["slowed_time"]["values"]]
    assert medians[0] < medians[5] < medians[10], "it does flow"
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
