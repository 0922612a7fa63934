"""The path against its definitions: derivatives by autograd, conversions by the pair (x0, x1) they came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import PATHS, normals, path_coefficients, uniforms

from mixflow_core.interpolant import Interpolant, broadcast

# Inside (0, 1): every conversion is defined there.
T = 0.05 + 0.9 * uniforms(1, 64)
X0, X1 = normals(2, 64, 3, 4, 4), 2 * normals(3, 64, 3, 4, 4) + 0.5


def _close(actual, expected, rtol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("path", PATHS)
def test_coefficients_equal_the_definitions_and_their_autograd_derivatives(path):
    t = T.clone().requires_grad_()
    c = Interpolant(path).coefficients(t)
    (d_alpha,) = torch.autograd.grad(c.alpha.sum(), t, retain_graph=True)
    (d_sigma,) = torch.autograd.grad(c.sigma.sum(), t)
    _close(c.d_alpha.detach(), d_alpha)
    _close(c.d_sigma.detach(), d_sigma)
    for value, truth in zip(c, path_coefficients(path, T.numpy()), strict=True):
        _close(value.detach(), torch.from_numpy(truth))


@pytest.mark.parametrize("path", PATHS)
def test_interpolation_and_velocity_are_the_path_and_its_derivative(path):
    alpha, sigma, d_alpha, d_sigma = (c.reshape(-1, 1, 1, 1) for c in path_coefficients(path, T.numpy()))
    interpolant = Interpolant(path)
    _close(interpolant.interpolate(x0=X0, x1=X1, t=T), torch.from_numpy(alpha * X1.numpy() + sigma * X0.numpy()))
    _close(interpolant.velocity(x0=X0, x1=X1, t=T), torch.from_numpy(d_alpha * X1.numpy() + d_sigma * X0.numpy()))


@pytest.mark.parametrize(("path", "alpha_0"), [("linear", 0.0), ("gvp", 0.0), ("vp", float(np.exp(-19.9 / 4 - 0.05)))])
def test_ends_are_noise_and_data(path, alpha_0):
    c = Interpolant(path).coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    _close(c.alpha, torch.tensor([alpha_0, 1.0], dtype=torch.float64), 1e-15)
    _close(c.sigma, torch.tensor([(1 - alpha_0**2) ** 0.5, 0.0], dtype=torch.float64), 1e-15)


def test_the_target_of_the_linear_path_does_not_depend_on_time():
    u = Interpolant("linear").velocity(x0=X0, x1=X1, t=T)
    assert torch.equal(u, X1 - X0)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_noise_score_and_data_determine_each_other(path):
    interpolant = Interpolant(path)
    x = interpolant.interpolate(x0=X0, x1=X1, t=T)
    v = interpolant.velocity(x0=X0, x1=X1, t=T)
    sigma = torch.from_numpy(path_coefficients(path, T.numpy())[1]).reshape(-1, 1, 1, 1)
    score = -X0 / sigma  # the score of N(alpha x1, sigma^2) at x
    _close(interpolant.noise_from_velocity(v, x=x, t=T), X0, 1e-8)
    _close(interpolant.data_from_velocity(v, x=x, t=T), X1, 1e-8)
    _close(interpolant.score_from_velocity(v, x=x, t=T), score, 1e-8)
    _close(interpolant.score_from_noise(X0, t=T), score, 1e-8)
    _close(interpolant.velocity_from_noise(X0, x=x, t=T), v, 1e-8)
    _close(interpolant.velocity_from_data(X1, x=x, t=T), v, 1e-8)
    _close(interpolant.velocity_from_score(score, x=x, t=T), v, 1e-8)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_data_is_found_where_noise_alone_would_divide_by_zero(path):
    interpolant = Interpolant(path)
    zero = torch.zeros(64, dtype=torch.float64)
    v = interpolant.velocity(x0=X0, x1=X1, t=zero)
    _close(interpolant.data_from_velocity(v, x=X0, t=zero), X1, 1e-12)
    _close(interpolant.noise_from_velocity(v, x=X0, t=zero), X0, 1e-12)


def test_vp_sigma_keeps_its_precision_next_to_the_data():
    t = torch.tensor([1 - 2.0**-20], dtype=torch.float32)
    sigma = Interpolant("vp").coefficients(t).sigma.double()
    s = 2.0**-20
    # To first order 1 - alpha^2 = 0.1 s: in float32 the difference itself would keep three digits only.
    torch.testing.assert_close(sigma, torch.tensor([(0.1 * s) ** 0.5], dtype=torch.float64), rtol=1e-4, atol=0)


def test_times_keep_their_shape_and_type():
    for shape in ((), (5,), (2, 3)):
        for value in Interpolant("gvp").coefficients(torch.full(shape, 0.3, dtype=torch.float32)):
            assert value.shape == shape
            assert value.dtype == torch.float32
    assert broadcast(torch.ones(4), torch.ones(4, 2, 3)).shape == (4, 1, 1)
    assert broadcast(torch.tensor(1.0), torch.ones(4, 2)).ndim == 0


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match=r"^path must be one of 'linear', 'gvp', 'vp', got 'cosine'$"):
        Interpolant("cosine")  # type: ignore[arg-type]  # the point of the test
