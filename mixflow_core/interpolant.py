"""The path between noise and data: x_t = alpha(t) x1 + sigma(t) x0 (the paper writes beta for sigma)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mixflow_core.checks import require_choice

PathName = Literal["linear", "gvp", "vp"]


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at a time, each of the shape of that time."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class Interpolant:
    """A Gaussian path from x0 ~ N(0, I) at t = 0 to data x1 at t = 1.

    `linear`: alpha = t, sigma = 1 - t.
    `gvp`: alpha = sin(pi t / 2), sigma = cos(pi t / 2).
    `vp`: the variance-preserving path of SiT: log alpha = -(1-t)^2 (beta_1 - beta_0)/4 - (1-t) beta_0/2 with
    beta_0 = 0.1 and beta_1 = 20, sigma = sqrt(1 - alpha^2). Its sigma has no derivative at t = 1.

    Tensors x, x0, x1, velocity, noise, score are (B, ...); times are (B,) in [0, 1].
    """

    path: PathName = "linear"

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown path."""
        require_choice("path", self.path, PathName)

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma, d alpha/dt and d sigma/dt at t (any shape)."""
        if self.path == "linear":
            return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))
        if self.path == "gvp":
            angle = t * (math.pi / 2)
            alpha, sigma = torch.sin(angle), torch.cos(angle)
            return Coefficients(alpha, sigma, alpha.new_tensor(math.pi / 2) * sigma, -(math.pi / 2) * alpha)
        return _vp_coefficients(t)

    def interpolate(self, *, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x1 + sigma(t) x0."""
        c = self._at(t, x1)
        return c.alpha * x1 + c.sigma * x0

    def velocity(self, *, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """u*(x_t, t) = alpha'(t) x1 + sigma'(t) x0, the target of flow matching."""
        c = self._at(t, x1)
        return c.d_alpha * x1 + c.d_sigma * x0

    # Given x = alpha x1 + sigma x0 and v = alpha' x1 + sigma' x0, any one of (velocity, noise, data, score) and x
    # determine the others by solving these two equations. The forms below divide only where the path itself must.

    def noise_from_velocity(self, velocity: Tensor, *, x: Tensor, t: Tensor) -> Tensor:
        """x0 from v: (alpha v - alpha' x) / (alpha sigma' - alpha' sigma)."""
        c = self._at(t, x)
        return (c.alpha * velocity - c.d_alpha * x) / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)

    def data_from_velocity(self, velocity: Tensor, *, x: Tensor, t: Tensor) -> Tensor:
        """x1 from v: (sigma' x - sigma v) / (alpha sigma' - alpha' sigma)."""
        c = self._at(t, x)
        return (c.d_sigma * x - c.sigma * velocity) / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)

    def score_from_velocity(self, velocity: Tensor, *, x: Tensor, t: Tensor) -> Tensor:
        """Score of p_t from v: minus the noise over sigma. Infinite at t = 1, where sigma = 0."""
        return self.score_from_noise(self.noise_from_velocity(velocity, x=x, t=t), t=t)

    def score_from_noise(self, noise: Tensor, *, t: Tensor) -> Tensor:
        """Score = -x0 / sigma(t)."""
        return -noise / self._at(t, noise).sigma

    def velocity_from_noise(self, noise: Tensor, *, x: Tensor, t: Tensor) -> Tensor:
        """V from x0: (alpha'/alpha) x - (alpha' sigma / alpha - sigma') x0. Undefined where alpha = 0 (t = 0)."""
        c = self._at(t, x)
        return (c.d_alpha / c.alpha) * x - (c.d_alpha * c.sigma / c.alpha - c.d_sigma) * noise

    def velocity_from_score(self, score: Tensor, *, x: Tensor, t: Tensor) -> Tensor:
        """V from the score: (alpha'/alpha) x + drift_variance(t) score."""
        c = self._at(t, x)
        return (c.d_alpha / c.alpha) * x + (c.d_alpha / c.alpha * c.sigma - c.d_sigma) * c.sigma * score

    def velocity_from_data(self, data: Tensor, *, x: Tensor, t: Tensor) -> Tensor:
        """V from x1: (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) x1. Undefined where sigma = 0 (t = 1)."""
        c = self._at(t, x)
        return (c.d_sigma / c.sigma) * x + (c.d_alpha - c.alpha * c.d_sigma / c.sigma) * data

    def drift_variance(self, t: Tensor) -> Tensor:
        """(alpha'/alpha) sigma^2 - sigma sigma': what multiplies the score in the velocity, and the SBDM diffusion."""
        c = self.coefficients(t)
        return c.d_alpha / c.alpha * c.sigma**2 - c.sigma * c.d_sigma

    def _at(self, t: Tensor, like: Tensor) -> Coefficients:
        return Coefficients(*(broadcast(value, like) for value in self.coefficients(t)))


def broadcast(t: Tensor, like: Tensor) -> Tensor:
    """A (B,) or scalar tensor with the trailing dimensions of `like` (B, ...) added."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def _vp_coefficients(t: Tensor, beta_0: float = 0.1, beta_1: float = 20.0) -> Coefficients:
    s = 1 - t
    log_alpha = -0.25 * s**2 * (beta_1 - beta_0) - 0.5 * s * beta_0
    d_log_alpha = 0.5 * s * (beta_1 - beta_0) + 0.5 * beta_0
    alpha = torch.exp(log_alpha)
    # -expm1 keeps sigma accurate near t = 1, where 1 - alpha^2 cancels.
    sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
    d_alpha = d_log_alpha * alpha
    return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)
