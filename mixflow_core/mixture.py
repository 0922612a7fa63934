"""MixFlow's slowed interpolation mixture (Algorithm 1 of arXiv 2512.19311), its ablation and its matched control.

One iteration of Algorithm 1, as `loss.per_sample_loss` runs it:

    t ~ Beta(2, 1)                            SlowedMixture.draw
    m ~ Uniform[(1 - gamma) t, t]             SlowedMixture.draw
    x_m = alpha(m) x1 + sigma(m) x0           SlowedMixture.pair
    || u_theta(x_m, t) - u*(x_m, m) ||^2      the network sees the interpolation at m but is told t
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mixflow_core.checks import require_choice
from mixflow_core.interpolant import Interpolant

TimeLaw = Literal["beta", "uniform", "logit_normal", "log_normal_angle"]
SlowingLaw = Literal["interval", "independent"]
Order = Literal["shift_then_slow", "slow_then_shift"]
TimeName = Literal["t", "m"]


class TimePair(NamedTuple):
    """Times of a batch, each (B,) in [0, 1]: `t` is what the network is told, `m` where the sample lies."""

    t: Tensor
    m: Tensor


class TrainingPair(NamedTuple):
    """What one training step sees: the sample x_m (B, ...), the time t it is labelled with, and its true target.

    `target` is the velocity u* at `target_time` (which is m, or t for MixFlow's variant on curved paths).
    """

    x_m: Tensor
    t: Tensor
    m: Tensor
    target_time: Tensor
    target: Tensor
    x0: Tensor
    x1: Tensor


@dataclass(frozen=True)
class SlowedMixture:
    """The joint law of (t, m), in this order: time law, then shift, then slowing.

    Attributes:
        time_law: `beta` is Beta(2, 1), density 2t, the paper's; `uniform` on [0, 1]; `logit_normal` is the logistic
            function of a standard normal; `log_normal_angle` is (2 / pi) atan(exp(N(0, 1))), REPA's on curved paths.
        shift: timestep shift, >= 1, applied to s = 1 - t as s -> shift s / (1 + (shift - 1) s) before slowing; 1: none.
        slowing_law: `interval`: m ~ U[(1 - gamma) t, t], the paper's. `independent`: m ~ U[0, 1] whatever t is, a row
            of the paper's ablation.
        gamma: range of the slowing, in [0, 1]; 0 gives m = t, standard interpolation; 0.8 is the paper's choice for
            SiT, 0.4 for RAE. Only `interval` has a range, so `independent` asks for 0.
        target_time: `m`: the target is u*(x_m, m); `t`: it is u*(x_t, t), which differs only on curved paths.
        condition_on: `t`: MixFlow. `m`: the matched-marginal control, which draws (t, m) the same way and then tells
            the network m, so that it trains on the same noise levels as often, without slowing. It has no counterpart
            in the paper.
        interval: lowest and highest t of the time law, truncated to it before the shift, 0 <= lowest < highest <= 1.
            RAE's published training leaves the last thousandth before the data out: (0.001, 1) for its uniform and
            logit-normal laws, and (0, 0.9995) for its MixFlow times, which are truncated at the other end.
        order: `shift_then_slow`, the published one, or `slow_then_shift`, which slows the law's own times and then
            shifts both.
    """

    time_law: TimeLaw
    slowing_law: SlowingLaw
    gamma: float
    target_time: TimeName
    condition_on: TimeName = "t"
    shift: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    order: Order = "shift_then_slow"

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when a value is out of its range."""
        require_choice("time_law", self.time_law, TimeLaw)
        require_choice("slowing_law", self.slowing_law, SlowingLaw)
        require_choice("target_time", self.target_time, TimeName)
        require_choice("condition_on", self.condition_on, TimeName)
        if not 0 <= self.gamma <= 1:
            raise ValueError(
                f"gamma must lie in [0, 1], got {self.gamma}; 0 is standard interpolation, 0.8 the paper's"
            )
        if self.slowing_law == "independent" and self.gamma != 0:
            raise ValueError(f"gamma must be 0 with slowing_law 'independent', got {self.gamma}; set gamma to 0")
        if not 1 <= self.shift < float("inf"):
            raise ValueError(f"shift must be at least 1, got {self.shift}; 1 is no shift")
        lowest, highest = self.interval
        if not 0 <= lowest < highest <= 1:
            raise ValueError(f"interval must satisfy 0 <= lowest < highest <= 1, got {list(self.interval)}")
        require_choice("order", self.order, Order)

    @property
    def is_standard(self) -> bool:
        """Whether the network is always told the time at which its sample lies."""
        return self.condition_on == "m" or (self.slowing_law == "interval" and self.gamma == 0)

    def draw(self, u: Tensor) -> TimePair:
        """Times from uniform numbers in [0, 1), shape (B, 2), by inverse distribution functions.

        The first column makes t, the second m, so that arms which differ in their slowing share their t.
        """
        t = self._time(u[:, 0])
        if self.order == "shift_then_slow":
            t = shift_time(t, self.shift)
        m = t - self.gamma * t * u[:, 1] if self.slowing_law == "interval" else u[:, 1]
        if self.order == "slow_then_shift":
            t, m = shift_time(t, self.shift), shift_time(m, self.shift)
        return TimePair(t=m if self.condition_on == "m" else t, m=m)

    def pair(self, interpolant: Interpolant, times: TimePair, *, x0: Tensor, x1: Tensor) -> TrainingPair:
        """The training pair at these times for noise x0 and data x1, both (B, ...)."""
        target_time = times.m if self.target_time == "m" else times.t
        return TrainingPair(
            x_m=interpolant.interpolate(x0=x0, x1=x1, t=times.m),
            t=times.t,
            m=times.m,
            target_time=target_time,
            target=interpolant.velocity(x0=x0, x1=x1, t=target_time),
            x0=x0,
            x1=x1,
        )

    def _time(self, u: Tensor) -> Tensor:
        """The time law's quantile function on `interval`."""
        lowest, highest = self.interval
        if self.time_law == "beta":
            return torch.sqrt(lowest**2 + (highest**2 - lowest**2) * u)
        if self.time_law == "uniform":
            return lowest + (highest - lowest) * u
        angle = self.time_law == "log_normal_angle"
        below, above = (_normal_below(t, angle) for t in self.interval)
        normal = torch.special.ndtri(below + (above - below) * u)
        return torch.atan(torch.exp(normal)) * (2 / math.pi) if angle else torch.sigmoid(normal)


def _normal_below(t: float, angle: bool) -> float:
    """P(N < n) for the standard normal n that the logistic function, or the angle, maps to t."""
    if t in (0, 1):
        return t
    n = math.log(math.tan(math.pi * t / 2)) if angle else math.log(t / (1 - t))
    return 0.5 * math.erfc(-n / math.sqrt(2))


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Moves times towards the noise: s -> shift s / (1 + (shift - 1) s) on s = 1 - t, any shape, shift >= 1.

    As a quotient of t, in which nothing cancels: 0 and 1 stay exactly where they are.
    """
    return t / (1 + (shift - 1) * (1 - t))
