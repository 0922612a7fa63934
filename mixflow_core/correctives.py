"""What MixFlow is compared with: other remedies for exposure bias, each off by default, combinable where independent.

In training, on the input of a TrainingPair; its time t and its target stay as they are:
    Input Perturbation (Ning et al. 2023, arXiv 2301.11706): more noise in the input than in the target.
    One-step self-rollout, ours: the model's own state after one Euler step instead of the interpolation.
In sampling, without training, around a velocity field:
    Epsilon Scaling (Ning et al. 2024, arXiv 2308.15321): the predicted noise is divided by a factor above 1.
    Time-Shift Sampler (Li et al. 2024, arXiv 2305.15583): the network is told the time that the state looks like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixflow_core.interpolant import Interpolant, broadcast
from mixflow_core.mixture import TrainingPair
from mixflow_core.samplers import Field, Sampler

# Training


def perturb_input(pair: TrainingPair, interpolant: Interpolant, *, noise: Tensor, strength: float) -> TrainingPair:
    """Input Perturbation: the input is made with x0 + strength * noise, the target with x0 (arXiv 2301.11706).

    Of any pair, slowed or self-rolled: adds strength * sigma(m) * noise to its x_m.

    Args:
        pair: what would be trained on.
        interpolant: gives sigma at the pair's m.
        noise: standard normal, of x_m's shape (B, ...), drawn independently of x0.
        strength: the paper's gamma, >= 0; 0.1 (0.15 on CIFAR-10) in its code.
    """
    sigma = interpolant.coefficients(pair.m).sigma
    return pair._replace(x_m=pair.x_m + strength * broadcast(sigma, noise) * noise)


def roll_out_one_step(
    pair: TrainingPair, interpolant: Interpolant, field: Field, *, step: float, replaced: Tensor, start: float = 0.0
) -> TrainingPair:
    """One-step self-rollout, ours: x_m of some samples becomes the model's own state at m after one Euler step.

    The step starts at the interpolation x_s with s = max(m - step, start), the network is told s, as a sampler would,
    and no gradient passes. Told time t and target stay the pair's, so m = t trains the velocity of (x0, x1) at t on
    what the model makes of it, and a slowed pair keeps its slowing: MixFlow and this combine. Self-Forcing, which the
    paper discusses, trains on whole rollouts; ReflexFlow (arXiv 2512.04904) schedules rollouts too and adjusts the
    target of such inputs, which this does not.

    Costs one forward pass of the whole batch without gradient, even if nothing is replaced: where a model is sharded
    over workers, all of them must call it.

    Args:
        pair: what would be trained on, from x0 and x1.
        interpolant: the pair's.
        field: the model's velocity u(x, t).
        step: length of the Euler step in time, > 0: the sampler's.
        replaced: which samples, (B,) boolean.
        start: the first time of sampling. Above 0 where the model's velocity is undefined at 0 (`times_defined`); a
            sample before it stays where it is.
    """
    s = torch.minimum((pair.m - step).clamp(min=start), pair.m)
    x_s = interpolant.interpolate(x0=pair.x0, x1=pair.x1, t=s)
    with torch.no_grad():
        own = x_s + broadcast(pair.m - s, x_s) * field(x_s, s)
    return pair._replace(x_m=torch.where(broadcast(replaced, own), own, pair.x_m))


@dataclass(frozen=True)
class TrainingCorrective:
    """Changes of a training pair's input; the defaults change nothing.

    Attributes:
        input_perturbation: strength of Input Perturbation, >= 0; 0 is none, 0.1 its paper's choice.
        rollout_share: share of a batch's samples that a self-rollout replaces once it is in full use, in [0, 1]; 0 is
            none.
        rollout_step: length of a self-rollout's Euler step in time, in (0, 1].
        rollout_ramp: the fraction of training, in (0, 1], over which the share grows linearly from 0.
    """

    input_perturbation: float = 0.0
    rollout_share: float = 0.0
    rollout_step: float = 0.0
    rollout_ramp: float = 0.0

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when a value is out of its range, or states something that is off."""
        if not 0 <= self.input_perturbation < math.inf:
            raise ValueError(f"input_perturbation must be at least 0, got {self.input_perturbation}; 0 is none")
        if not 0 <= self.rollout_share <= 1:
            raise ValueError(f"rollout_share must lie in [0, 1], got {self.rollout_share}; 0 is none")
        for name in ("rollout_step", "rollout_ramp"):
            _require_with(name, getattr(self, name), on=self.rollout_share > 0, what="rollout_share")

    @property
    def is_off(self) -> bool:
        """Whether pairs stay as they are."""
        return self.input_perturbation == 0 and self.rollout_share == 0

    def share_at(self, progress: float) -> float:
        """The share that is replaced at a progress of step / num_steps in [0, 1]: scheduled sampling, linear.

        Raises:
            ValueError: the progress lies outside.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress}; it is the step over the number of steps")
        return self.rollout_share * min(progress / self.rollout_ramp, 1) if self.rollout_share else 0.0

    def apply(
        self,
        pair: TrainingPair,
        interpolant: Interpolant,
        field: Field,
        *,
        progress: float,
        noise: Tensor | None = None,
        u: Tensor | None = None,
        start: float = 0.0,
    ) -> TrainingPair:
        """The pair to train on: first rolled out, then perturbed, the rolled samples too.

        Args:
            pair: from the mixture.
            interpolant: the pair's.
            field: the model's velocity; asked only where there is a rollout.
            progress: step / num_steps, in [0, 1].
            noise: standard normal, of x_m's shape; needed with input_perturbation.
            u: uniform in [0, 1), (B,); needed with rollout_share: a sample is replaced where u is below the share.
            start: first time of sampling, see roll_out_one_step.

        Raises:
            ValueError: random numbers are missing.
        """
        if self.rollout_share > 0:
            if u is None:
                raise ValueError("u must be given with rollout_share, got None; draw a uniform number for each sample")
            replaced = u < self.share_at(progress)
            pair = roll_out_one_step(pair, interpolant, field, step=self.rollout_step, replaced=replaced, start=start)
        if self.input_perturbation > 0:
            if noise is None:
                raise ValueError("noise must be given with input_perturbation, got None; draw one of x_m's shape")
            pair = perturb_input(pair, interpolant, noise=noise, strength=self.input_perturbation)
        return pair


# Sampling


def epsilon_scaled(field: Field, interpolant: Interpolant, factor: Callable[[Tensor], Tensor]) -> Field:
    """Epsilon Scaling: the field whose predicted noise is that of `field` over factor(t), at the same x and t.

    At fixed x and t the velocity is linear in the noise, v = (alpha'/alpha) x + (sigma' - alpha' sigma / alpha) noise,
    so v changes by (sigma' - alpha' sigma / alpha) (1 / factor - 1) noise. Where alpha = 0 (t = 0 on linear and gvp)
    the state is the noise and says nothing about the data: other noise has no velocity there, and the velocity stays
    as it is. A sampler that starts at 0 thus leaves its first evaluation unscaled, a single Euler step altogether.
    Just above 0 the change is large, on linear (1 - 1 / factor) / t times the noise: start at 0 or well above it.

    Args:
        field: u(x, t).
        interpolant: the path on which x lies.
        factor: from times (B,) to factors (B,), > 0; 1 leaves the field as it is.
    """

    def scaled(x: Tensor, t: Tensor) -> Tensor:
        velocity = field(x, t)
        c = interpolant.coefficients(t)
        slope = torch.where(c.alpha > 0, c.d_sigma - c.d_alpha * c.sigma / c.alpha, 0)
        noise = interpolant.noise_from_velocity(velocity, x=x, t=t)
        return velocity + broadcast(slope * (1 / factor(t) - 1), x) * noise

    return scaled


def coupled_time(
    x: Tensor,
    t: Tensor,
    interpolant: Interpolant,
    *,
    window: float,
    data_variance: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """The time in a window around t whose marginal variance is nearest to the variance of the state, (B,).

    Args:
        x: states (B, ...) with two values or more each; a state's variance is that of its values, as in the paper.
        t: the sampler's times, (B,).
        interpolant: gives the marginal variance, alpha^2 data_variance + sigma^2.
        window: width, in (0, 1]: candidates lie in [t - window / 2, t + window / 2], at most a thousandth apart.
        data_variance: variance of the values of one clean sample, >= 0; 0 as published.
        interval: candidates outside it fall on its ends.

    Raises:
        ValueError: a state has a single value.
    """
    if x[0].numel() < 2:
        raise ValueError(f"x must have at least 2 values a sample to have a variance, got shape {tuple(x.shape)}")
    offsets = torch.linspace(-window / 2, window / 2, 2 * math.ceil(window * 500) + 1, dtype=t.dtype, device=t.device)
    candidates = (t[:, None] + offsets).clamp(*interval)
    c = interpolant.coefficients(candidates)
    variance = c.alpha**2 * data_variance + c.sigma**2
    nearest = (variance - x.flatten(1).var(1)[:, None]).abs().argmin(1)
    return candidates.gather(1, nearest[:, None])[:, 0]


@dataclass(frozen=True)
class SamplingCorrective:
    """Changes of a velocity field for a fixed-step Sampler; the defaults change nothing.

    Both see every evaluation and cost none. Together the time is shifted first and the noise is scaled then, at the
    sampler's time. What lies inside the field, as guidance in an interval, reads the shifted time; an SDE's own
    conversions keep the sampler's.

    Attributes:
        epsilon_scale: b of Epsilon Scaling's factor b + k n, > 0; 1 is none. n is the number of steps left: num_steps
            at the first evaluation, 1 at the start of the last step, 0 at the end (Heun's last). The index of its
            published code falls while sampling too, and is n - 1. Published there: 1.005 to 1.017 at 100 steps, 1.0006
            for Heun with 18.
        epsilon_growth: k; 0 is the uniform schedule, as its code has it unless edited. Above 0 the factor is largest
            near the noise and falls to b at the data, as in that code's linear schedule; below 0 it grows while
            sampling.
        time_shift_window: width of the Time-Shift Sampler's window in time, in [0, 1]; 0 is none. The paper's w is
            1000 times it, 5 to 30 in its code's examples. The first evaluation, of pure noise, is never shifted.
        time_shift_cutoff: times from here on are not shifted, in (0, 1]; the paper's t_c is 1000 (1 - cutoff), 300 to
            900 in its code's examples. Near the data the variance says little about the time.
        data_variance: variance of the values of one clean sample in the marginal variance alpha^2 data_variance +
            sigma^2, >= 0. 0, as published, compares with the noise alone.
    """

    epsilon_scale: float = 1.0
    epsilon_growth: float = 0.0
    time_shift_window: float = 0.0
    time_shift_cutoff: float = 0.0
    data_variance: float = 0.0

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when a value is out of its range, or states something that is off."""
        if not 0 < self.epsilon_scale < math.inf:
            raise ValueError(f"epsilon_scale must be above 0, got {self.epsilon_scale}; 1 is no scaling")
        if not math.isfinite(self.epsilon_growth):
            raise ValueError(f"epsilon_growth must be finite, got {self.epsilon_growth}; 0 is the uniform schedule")
        if not 0 <= self.time_shift_window <= 1:
            raise ValueError(f"time_shift_window must lie in [0, 1], got {self.time_shift_window}; 0 is no shift")
        shifts = self.time_shift_window > 0
        _require_with("time_shift_cutoff", self.time_shift_cutoff, on=shifts, what="time_shift_window")
        if not 0 <= self.data_variance < math.inf:
            raise ValueError(f"data_variance must be at least 0, got {self.data_variance}; 0 is as published")
        if self.data_variance and not shifts:
            raise ValueError(f"data_variance must be left out without time_shift_window, got {self.data_variance}")

    @property
    def is_off(self) -> bool:
        """Whether fields stay as they are."""
        return not self._scales and self.time_shift_window == 0

    @property
    def name(self) -> str:
        """What a metric key adds to Sampler.name, `-es1.005-ts0.04to0.7`; empty when off."""
        scale = f"-es{self.epsilon_scale:g}" * self._scales + f"-k{self.epsilon_growth:g}" * bool(self.epsilon_growth)
        shift = f"-ts{self.time_shift_window:g}to{self.time_shift_cutoff:g}" * bool(self.time_shift_window)
        return scale + shift + f"-var{self.data_variance:g}" * bool(self.data_variance)

    def wrap(self, field: Field, interpolant: Interpolant, sampler: Sampler) -> Field:
        """The corrected field, for `sampler` alone; the field itself when off.

        Raises:
            ValueError: the sampler has no fixed steps, nothing would be shifted, all times have one variance, or a
                factor is not positive.
        """
        if self.is_off:
            return field
        if sampler.method == "dopri5":
            raise ValueError("method must have fixed steps, got 'dopri5'; choose euler, heun or an SDE")
        times = sampler.times()
        if self.time_shift_window:
            field = self._shifted(field, interpolant, times)
        if not self._scales:
            return field
        first = self.epsilon_scale + self.epsilon_growth * sampler.num_steps
        if first <= 0:
            raise ValueError(f"epsilon_scale + epsilon_growth * num_steps must be above 0, got {first:g}")
        return epsilon_scaled(field, interpolant, lambda t: self._factor(t, times.to(t)))

    def _factor(self, t: Tensor, times: Tensor) -> Tensor:
        """Epsilon Scaling's factor at times t (B,), each of them one of the sampler's `times`."""
        steps_left = len(times) - 1 - (t[:, None] - times).abs().argmin(1)
        return self.epsilon_scale + self.epsilon_growth * steps_left.to(t.dtype)

    def _shifted(self, field: Field, interpolant: Interpolant, times: Tensor) -> Field:
        """The field that tells its network the coupled time, between the first of `times` and the cutoff."""
        if self.time_shift_cutoff <= float(times[1]):
            raise ValueError(
                f"time_shift_cutoff must lie above the second time of the sampler, {float(times[1]):g}, or nothing is "
                f"shifted, got {self.time_shift_cutoff}"
            )
        if self.data_variance == 1 and interpolant.path != "linear":
            raise ValueError(
                f"data_variance must not be 1 on {interpolant.path}, where all times then have variance 1; 0 is as "
                "published"
            )
        settings = {"window": self.time_shift_window, "data_variance": self.data_variance}
        interval = (float(times[0]), float(times[-1]))

        def shifted(x: Tensor, t: Tensor) -> Tensor:
            inside = (t > times[0].to(t)) & (t < self.time_shift_cutoff)
            return field(x, torch.where(inside, coupled_time(x, t, interpolant, interval=interval, **settings), t))

        return shifted

    @property
    def _scales(self) -> bool:
        """Whether Epsilon Scaling is on."""
        return self.epsilon_scale != 1 or self.epsilon_growth != 0


def _require_with(name: str, value: float, *, on: bool, what: str) -> None:
    """Raises ValueError unless `value` lies in (0, 1] with the method that `what` switches on, or is 0 without it."""
    if on and not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1] with {what}, got {value}")
    if not on and value != 0:
        raise ValueError(f"{name} must be left out without {what}, got {value}")
