"""The error-free field of a finite set of images, against the score of its mixture of Gaussians and its own loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toys import PATHS, alpha_sigma, normals, path_coefficients

from mixflow_core.exact import EmpiricalField, UndefinedFieldError
from mixflow_core.interpolant import Interpolant

LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
IMAGES = normals(1, 6, 2, 3, 3)


def velocity_by_score(path, x, t, images):
    """alpha'/alpha x + ((alpha'/alpha) sigma^2 - sigma sigma') grad log p_t, p_t = mean of N(alpha x1_i, sigma^2)."""
    x = x.clone().requires_grad_(True)
    alpha, sigma, d_alpha, d_sigma = (float(c) for c in path_coefficients(path, np.array(t)))
    squares = (x[:, None] - alpha * images[None]).square().flatten(2).sum(2)
    (score,) = torch.autograd.grad(torch.logsumexp(-squares / (2 * sigma**2), 1).sum(), x)
    return d_alpha / alpha * x.detach() + (d_alpha / alpha * sigma**2 - sigma * d_sigma) * score


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_it_is_the_velocity_of_the_mixtures_score(path, t):
    alpha, sigma = alpha_sigma(path, t)
    x, y = alpha * IMAGES + sigma * normals(2, *IMAGES.shape), LABELS
    field = EmpiricalField(IMAGES, LABELS, Interpolant(path), null_label=3)
    found = field(x, torch.full((6,), t, dtype=torch.float64), y)
    for label in range(3):
        expected = velocity_by_score(path, x[y == label], t, IMAGES[y == label])
        torch.testing.assert_close(found[y == label], expected, rtol=1e-8, atol=1e-8)
    of_all = field(x, torch.full((6,), t, dtype=torch.float64), torch.full((6,), 3))
    torch.testing.assert_close(of_all, velocity_by_score(path, x, t, IMAGES), rtol=1e-8, atol=1e-8)


def test_each_row_has_its_own_time():
    field, t = EmpiricalField(IMAGES, LABELS, Interpolant("linear")), torch.linspace(0.1, 0.9, 6).double()
    together = field(IMAGES, t, LABELS)
    for i in range(6):
        torch.testing.assert_close(together[i : i + 1], field(IMAGES[i : i + 1], t[i : i + 1], LABELS[i : i + 1]))


def test_of_one_image_it_leads_straight_to_it():
    field, x = EmpiricalField(IMAGES, LABELS, Interpolant("linear")), normals(3, 1, 2, 3, 3).float()
    found = field(x, torch.tensor([0.75]), torch.tensor([2]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ((IMAGES[3] - x) / 0.25).float(), rtol=1e-5, atol=1e-5)


def test_no_field_has_a_smaller_loss():
    """The minimiser: any change of its scale raises the mean of |u - v|^2."""
    n, t = 4000, 0.6
    rows = torch.arange(n) % 6
    x0, x1 = normals(4, n, 2, 3, 3), IMAGES[rows]
    field = EmpiricalField(IMAGES, LABELS, Interpolant("linear"))
    u = field((1 - t) * x0 + t * x1, torch.full((n,), t, dtype=torch.float64), LABELS[rows])
    losses = [float((scale * u - (x1 - x0)).square().mean()) for scale in (0.97, 1.0, 1.03)]
    assert losses[1] == min(losses)


def test_at_the_data_end_it_is_undefined():
    field = EmpiricalField(IMAGES, LABELS, Interpolant("linear"))
    for t in (1.0, 1.25):
        with pytest.raises(UndefinedFieldError, match=f"no finite value at t = {t:g}, where sigma"):
            field(IMAGES, torch.full((6,), t), LABELS)
    near = field(IMAGES, torch.full((6,), 1 - 1e-6, dtype=torch.float64), LABELS)
    assert math.isfinite(float(near.abs().max()))


def test_a_class_without_images_is_an_error():
    field = EmpiricalField(IMAGES, LABELS, Interpolant("linear"))
    with pytest.raises(ValueError, match="y must be classes with images, got 7"):
        field(IMAGES[:1], torch.tensor([0.5]), torch.tensor([7]))
