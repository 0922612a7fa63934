"""Guidance on models whose answers are known."""

from __future__ import annotations

import pytest
import torch
from toys import normals

from mixflow_core.guidance import autoguided, classifier_free

X = normals(1, 3, 4, 2, 2)
Y, NULL = torch.tensor([1, 2, 3]), 10


class Model:
    """v(x, t, y) = x + t + 100 y, remembering the batches it saw."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return x + (t + 100 * y).reshape(-1, 1, 1, 1)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def conditional(t):
    return X + (t + 100 * Y).reshape(-1, 1, 1, 1)


def unconditional(t):
    return X + (t + 100 * NULL).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_moves_from_the_unconditional_through_the_conditional_field(scale):
    t = times(0.1, 0.5, 0.9)
    field = classifier_free(Model(), Y, guidance_scale=scale, null_label=NULL)(X, t)
    torch.testing.assert_close(field, unconditional(t) + scale * (conditional(t) - unconditional(t)))


def test_scale_one_is_the_model_itself_in_one_call_of_its_own_batch():
    model, t = Model(), times(0.1, 0.5, 0.9)
    assert torch.equal(classifier_free(model, Y, guidance_scale=1.0, null_label=NULL)(X, t), conditional(t))
    assert model.batches == [3]
    classifier_free(model, Y, guidance_scale=1.5, null_label=NULL)(X, t)
    assert model.batches == [3, 6]


def test_only_the_first_channels_are_guided():
    t = times(0.1, 0.5, 0.9)
    field = classifier_free(Model(), Y, guidance_scale=3.0, null_label=NULL, num_channels=3)(X, t)
    full = classifier_free(Model(), Y, guidance_scale=3.0, null_label=NULL)(X, t)
    assert torch.equal(field[:, :3], full[:, :3])
    assert torch.equal(field[:, 3:], conditional(t)[:, 3:])


def test_the_interval_is_closed_and_read_for_each_sample():
    model, t = Model(), times(0.3, 0.5, 0.29)
    guided = classifier_free(model, Y, guidance_scale=2.0, null_label=NULL, interval=(0.3, 0.5))
    field = guided(X, t)
    everywhere = unconditional(t) + 2 * (conditional(t) - unconditional(t))
    torch.testing.assert_close(field[:2], everywhere[:2])
    torch.testing.assert_close(field[2], conditional(t)[2])
    assert model.batches == [6]


def test_outside_the_interval_there_is_one_call_of_its_own_batch():
    for outside in ((0.0, 0.1, 0.2), (0.6, 0.8, 1.0)):
        model, t = Model(), times(*outside)
        guided = classifier_free(model, Y, guidance_scale=2.0, null_label=NULL, interval=(0.3, 0.5))
        assert torch.equal(guided(X, t), conditional(t))
        assert model.batches == [3]


def test_without_an_interval_guidance_goes_on_where_an_adaptive_solver_steps_beyond_the_data():
    t = times(0.99, 1.0, 1.7)
    field = classifier_free(Model(), Y, guidance_scale=2.0, null_label=NULL)(X, t)
    torch.testing.assert_close(field, unconditional(t) + 2 * (conditional(t) - unconditional(t)))


class Guide(Model):
    """g(x, t, y) = -2 x + 3 t + y."""

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return (3 * t + y).reshape(-1, 1, 1, 1) - 2 * x


def weaker(t):
    return (3 * t + Y).reshape(-1, 1, 1, 1) - 2 * X


def test_autoguidance_moves_from_the_guide_through_the_main_model():
    main, guide, t = Model(), Guide(), times(0.1, 0.5, 0.9)
    field = autoguided(main, guide, Y, guidance_scale=1.42)(X, t)
    torch.testing.assert_close(field, weaker(t) + 1.42 * (conditional(t) - weaker(t)))
    assert (main.batches, guide.batches) == ([3], [3])


def test_autoguidance_at_scale_one_or_outside_its_interval_asks_the_main_model_alone():
    for scale, interval, values in (
        (1.0, (0.0, 1.0), (0.1, 0.5, 0.9)),
        (1.42, (0.3, 0.5), (0.0, 0.1, 0.2)),
        (1.42, (0.3, 0.5), (0.6, 0.8, 1.0)),
    ):
        main, guide, t = Model(), Guide(), times(*values)
        guided = autoguided(main, guide, Y, guidance_scale=scale, interval=interval)
        assert torch.equal(guided(X, t), conditional(t))
        assert (main.batches, guide.batches) == ([3], [])


def test_the_interval_of_autoguidance_is_closed_and_read_for_each_sample():
    for outside in (0.29, 0.51):
        main, guide, t = Model(), Guide(), times(0.3, 0.5, outside)
        field = autoguided(main, guide, Y, guidance_scale=3.0, interval=(0.3, 0.5))(X, t)
        torch.testing.assert_close(field[:2], (weaker(t) + 3 * (conditional(t) - weaker(t)))[:2])
        assert torch.equal(field[2], conditional(t)[2])
        assert (main.batches, guide.batches) == ([3], [3])


def test_autoguidance_without_an_interval_goes_on_beyond_the_data():
    t = times(0.99, 1.0, 1.7)
    field = autoguided(Model(), Guide(), Y, guidance_scale=2.0)(X, t)
    torch.testing.assert_close(field, 2 * conditional(t) - weaker(t))
