"""The average against a plain loop, and its warm-up."""

from __future__ import annotations

import pytest
import torch
from toys import normals

from mixflow_core.ema import EMA, warm_decay


def parameters(seed):
    return {"a": normals(seed, 3, 2), "b": normals(seed + 100, 4)}


def test_the_average_is_a_plain_loop():
    start = parameters(0)
    ema = EMA(start, 0.9)
    expected = {name: value.tolist() for name, value in ((n, v.flatten()) for n, v in start.items())}
    for step in range(1, 200):
        new = parameters(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, values in expected.items():
            expected[name] = [
                decay * s + (1 - decay) * p for s, p in zip(values, new[name].flatten().tolist(), strict=True)
            ]
        ema.update(list(new.values()), step)
    for name, values in expected.items():
        assert ema.shadow[name].flatten().tolist() == pytest.approx(values, rel=1e-12)


def test_the_warm_up_ends_at_the_decay_and_never_passes_it():
    decays = [warm_decay(0.999, step) for step in range(1, 20_000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[8988] < 0.999
    assert decays[8989] == decays[-1] == 0.999  # (1 + s) / (10 + s) = 0.999 at s = 8990


def test_untrained_weights_are_soon_forgotten():
    def weight_of_the_start(decay, steps):
        ema = EMA({"w": torch.ones(1, dtype=torch.float64)}, decay)
        for step in range(1, steps + 1):
            ema.update([torch.zeros(1, dtype=torch.float64)], step)
        return float(ema.shadow["w"])

    assert weight_of_the_start(0.999, 100) < 1e-9
    assert weight_of_the_start(0.0, 1) == 0.0


def test_the_average_is_a_copy_and_leaves_its_parameters_alone():
    live = parameters(0)
    ema = EMA(live, 0.5)
    assert all(torch.equal(ema.shadow[name], value) for name, value in live.items())
    live["a"] += 1
    assert not torch.equal(ema.shadow["a"], live["a"])
    before = {name: value.clone() for name, value in live.items()}
    ema.update(list(live.values()), 1)
    assert all(torch.equal(before[name], value) for name, value in live.items())


def test_trainable_parameters_leave_no_graph_behind():
    weight = torch.nn.Parameter(torch.ones(2))
    ema = EMA({"w": weight}, 0.5)
    ema.update([weight], 1)
    assert not ema.shadow["w"].requires_grad


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"^ema_decay must lie in \[0, 1\), got {decay}$"):
        EMA(parameters(0), decay)
