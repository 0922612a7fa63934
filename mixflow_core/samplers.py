"""Samplers: integrate dx/dt = u(x, t) from noise at t = 0 to data at t = 1 (or the SDE with the same marginals).

Every sampler takes a field u(x, t) with x (B, ...) and t (B,), a start x, and a time grid of num_steps + 1 times:
`num_steps` always means steps. The published SiT code counts the grid's points instead (50 points are 49 steps).
A sampler yields its states one by one, since those of 250 steps fill 250 times the memory of a batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mixflow_core.checks import require_choice
from mixflow_core.interpolant import Interpolant, broadcast
from mixflow_core.mixture import shift_time

Field = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
Method = Literal["euler", "heun", "dopri5", "sde", "sde_heun"]
Guidance = Literal["classifier_free", "autoguidance"]
DiffusionForm = Literal["sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"]
LastStep = Literal["none", "mean", "tweedie", "euler"]
MOST_STEPS = 10_000  # 40 times what is published; more is a slip


class CountedField:
    """A field, or a model, that counts its network evaluations: NFE is what was called, not what a formula says.

    Args:
        field: u(x, t), or model(x, t, y).
        num_samples: samples of the batch: guidance calls the network on two rows a sample where it acts, and on one
            elsewhere. None counts calls.
    """

    def __init__(self, field: Callable[..., Tensor], num_samples: int | None = None) -> None:
        self.field = field
        self.num_samples = num_samples
        self.nfe = 0

    def __call__(self, x: Tensor, *arguments: Tensor) -> Tensor:
        """What the field says at x."""
        self.nfe += x.shape[0] // (self.num_samples or x.shape[0])
        return self.field(x, *arguments)


def time_grid(num_steps: int, *, start: float = 0.0, end: float = 1.0, shift: float = 1.0) -> Tensor:
    """num_steps + 1 times from start to end, evenly spaced, then shifted towards the noise; float32.

    Raises:
        ValueError: num_steps is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    grid = torch.linspace(start, end, num_steps + 1)
    return grid if shift == 1 else shift_time(grid, shift)


def euler(field: Field, x: Tensor, grid: Tensor) -> Iterator[Tensor]:
    """Euler's method; the states at every time of the grid, the start first."""
    yield x
    for t, t_next in pairwise(grid):
        x = x + (t_next - t) * _velocity(field, x, t)
        yield x


def heun(field: Field, x: Tensor, grid: Tensor) -> Iterator[Tensor]:
    """Heun's second-order method (two evaluations a step); the states at every time of the grid."""
    yield x
    for t, t_next in pairwise(grid):
        h = t_next - t
        slope = _velocity(field, x, t)
        x = x + h * (slope + _velocity(field, x + h * slope, t_next)) / 2
        yield x


def dopri5(field: Field, x: Tensor, grid: Tensor, *, atol: float = 1e-6, rtol: float = 1e-3) -> Iterator[Tensor]:
    """Adaptive Dormand-Prince 5(4) by torchdiffeq; the grid only says which states are returned.

    The step size follows the error over the whole batch, so samples depend on their batch mates, and the network may be
    called slightly beyond the last time (torchdiffeq interpolates back).
    """
    from torchdiffeq import odeint  # 0.5 s to import, needed by no other sampler

    yield from odeint(lambda t, state: _velocity(field, state, t), x, grid, method="dopri5", atol=atol, rtol=rtol)


def final(states: Iterator[Tensor]) -> Tensor:
    """The last of a sampler's states, keeping none of the others."""
    return deque(states, maxlen=1).pop()


def _velocity(field: Field, x: Tensor, t: Tensor) -> Tensor:
    """The field at one time for all samples."""
    return field(x, t.to(x.dtype).expand(x.shape[0]))


@dataclass(frozen=True)
class Diffusion:
    """The diffusion w(t) of dx = [u + w score] dt + sqrt(2 w) dW: any w >= 0 keeps the marginals.

    Attributes:
        form: `sbdm`: the interpolant's drift_variance (infinite at t = 0); `sigma`: sigma(t); `linear`: 1 - t;
            `decreasing`: (cos(pi t) + 1)^2 / 4; `increasing_decreasing`: sin(pi t)^2.
        norm: multiplies w, except for `decreasing`, where it multiplies the cosine.
    """

    form: DiffusionForm = "sigma"
    norm: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown form."""
        require_choice("form", self.form, DiffusionForm)

    def __call__(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        """The diffusion w at t, of t's shape."""
        if self.form == "sbdm":
            return self.norm * interpolant.drift_variance(t)
        if self.form == "sigma":
            return self.norm * interpolant.coefficients(t).sigma
        if self.form == "linear":
            return self.norm * (1 - t)
        if self.form == "decreasing":
            return 0.25 * (self.norm * torch.cos(math.pi * t) + 1) ** 2
        return self.norm * torch.sin(math.pi * t) ** 2


def sde(
    field: Field,
    x: Tensor,
    grid: Tensor,
    interpolant: Interpolant,
    noise: Noise,
    *,
    diffusion: Diffusion = Diffusion(),
    corrector: bool = False,
    last_step: LastStep = "mean",
) -> Iterator[Tensor]:
    """Euler-Maruyama, or stochastic Heun with `corrector`, then one last noise-free step from the grid's end to 1.

    Args:
        field: u(x, t), called once a step (the score follows from the velocity).
        x: start, (B, ...).
        grid: times of the noisy steps.
        interpolant: gives the score from the velocity.
        noise: noise(k) is the standard normal of noisy step k, shaped as x.
        diffusion: w(t).
        corrector: add the noise first, then a Heun step of the drift from the noised state (two evaluations a step).
        last_step: `mean`: the SDE's drift; `euler`: the ODE's velocity; `tweedie`: the posterior mean of the data;
            `none`: no last step.

    Yields:
        The states at every time of the grid, and the one after the last step.

    Raises:
        ValueError: an unknown last step.
    """
    require_choice("last_step", last_step, LastStep)

    def drift(state: Tensor, t: Tensor) -> Tensor:
        velocity = _velocity(field, state, t)
        score = interpolant.score_from_velocity(velocity, x=state, t=t)
        return velocity + broadcast(diffusion(interpolant, t), state) * score

    yield x
    for k, (t, t_next) in enumerate(pairwise(grid)):
        h = t_next - t
        kick = torch.sqrt(2 * diffusion(interpolant, t) * h) * noise(k)
        if corrector:
            x = x + kick
            slope = drift(x, t)
            x = x + h * (slope + drift(x + h * slope, t_next)) / 2
        else:
            x = x + h * drift(x, t) + kick
        yield x
    t = grid[-1]
    if last_step == "mean":
        yield x + (1 - t) * drift(x, t)
    elif last_step == "euler":
        yield x + (1 - t) * _velocity(field, x, t)
    elif last_step == "tweedie":
        yield interpolant.data_from_velocity(_velocity(field, x, t), x=x, t=t)


@dataclass(frozen=True)
class Sampler:
    """One way to sample, as it stands in a protocol. Times are this project's: 0 is noise, 1 is data.

    Attributes:
        method: `euler`, `heun` (2 evaluations a step), `sde` (Euler-Maruyama: num_steps - 1 noisy steps and one last
            noise-free step), `sde_heun` (the same with a corrector: 2 evaluations a noisy step), or `dopri5` (adaptive;
            num_steps has no meaning and must be 1).
        num_steps: steps, at least 1 (2 for an SDE with a last step) and at most 10,000.
        guidance_scale: s in v_u + s (v_c - v_u); 1 is unguided.
        shift: timestep shift of the grid, >= 1; 1 is none.
        start, end: first and last time before the shift. A model that was trained or published on a part of [0, 1] is
            sampled there (RAE ends at 0.999). An SDE with a last step goes to 1 - last_step_size, then to 1: its
            end is 1.
        guidance: `classifier_free`, or `autoguidance` by the experiment's guide, a weaker model.
        guidance_channels: guide only the first channels (SiT's published samples guide 3 of 4); 0 is all, as it must be
            for autoguidance.
        guidance_interval: guide where t lies in this closed interval; an end at 0 or 1 is open beyond it.
        diffusion: w(t) of an SDE, see Diffusion.
        last_step: of an SDE, see sde.
        last_step_size: of an SDE, in (0, 1); 0.04 in the published code.
    """

    method: Method
    num_steps: int
    guidance_scale: float = 1.0
    shift: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guidance: Guidance = "classifier_free"
    guidance_channels: int = 0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    diffusion: DiffusionForm = "sigma"
    last_step: LastStep = "mean"
    last_step_size: float = 0.04

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when a value is out of its range."""
        for name, choices in (
            ("method", Method), ("guidance", Guidance), ("diffusion", DiffusionForm), ("last_step", LastStep)
        ):  # fmt: skip
            require_choice(name, getattr(self, name), choices)
        least = 2 if self.is_sde and self.last_step != "none" else 1
        if self.num_steps < least:
            raise ValueError(f"num_steps must be at least {least} for {self.method}, got {self.num_steps}")
        if self.num_steps > MOST_STEPS:
            raise ValueError(f"num_steps must be at most {MOST_STEPS}, got {self.num_steps}; lower it")
        if self.method == "dopri5" and self.num_steps != 1:
            raise ValueError(f"num_steps must be 1 for dopri5, which chooses its own steps, got {self.num_steps}")
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be at least 1, got {self.guidance_scale}; 1 is unguided")
        if not 1 <= self.shift < math.inf:
            raise ValueError(f"shift must be at least 1, got {self.shift}; 1 is no shift")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start and end must satisfy 0 <= start < end <= 1, got {self.start} and {self.end}")
        if self.guidance_channels < 0:
            raise ValueError(f"guidance_channels must be at least 0, got {self.guidance_channels}; 0 is all")
        if self.guidance_channels and self.guidance == "autoguidance":
            raise ValueError(f"guidance_channels must be 0 for {self.guidance}, got {self.guidance_channels}; omit it")
        if self._closes and self.end != 1:
            raise ValueError(
                f"end must be 1 for an SDE with a last step, got {self.end}; set last_step_size, or last_step: none"
            )
        lowest, highest = self.guidance_interval
        if not 0 <= lowest < highest <= 1:
            raise ValueError(f"guidance_interval must satisfy 0 <= low < high <= 1, got {[lowest, highest]}")
        for name in ("guidance", "guidance_channels", "guidance_interval"):
            if self.guidance_scale == 1 and getattr(self, name) != getattr(Sampler, name):
                raise ValueError(
                    f"{name} must be left out at guidance_scale 1, which is unguided, got {getattr(self, name)!r}; "
                    "raise guidance_scale, or remove it"
                )
        if not 0 < self.last_step_size < 1 - self.start:
            raise ValueError(f"last_step_size must lie in (0, 1 - start), got {self.last_step_size}")
        for name in ("diffusion", "last_step", "last_step_size"):
            if not self.is_sde and getattr(self, name) != getattr(Sampler, name):
                raise ValueError(
                    f"{name} must be left out for {self.method}, which has no noise, got {getattr(self, name)!r}"
                )

    @property
    def expected_nfe(self) -> int:
        """Network evaluations of an image as plans reckon them: guided everywhere, 100 for dopri5. See CountedField."""
        per_step = {"euler": 1, "heun": 2, "sde": 1, "sde_heun": 2, "dopri5": 100}[self.method]
        return self.num_steps * per_step * (1 if self.guidance_scale == 1 else 2)

    @property
    def is_sde(self) -> bool:
        """Whether it draws noise on its way."""
        return self.method in ("sde", "sde_heun")

    @property
    def name(self) -> str:
        """`<method><steps>/s<scale>`, as in metric keys: euler8/s1.5; what differs from the defaults is added to it."""
        steps, scale = f"{self.method}{self.num_steps}", f"s{_exact(self.guidance_scale)}"
        steps += f"-shift{self.shift:g}" * (self.shift != 1)
        steps += f"-from{self.start:g}" * (self.start != 0) + f"-to{self.end:g}" * (self.end != 1)
        steps += f"-{self.diffusion}" * (self.diffusion != "sigma") + f"-last_{self.last_step}" * (
            self.last_step != "mean"
        )
        steps += f"-last{self.last_step_size:g}" * (self.last_step_size != 0.04)
        scale += "-auto" * (self.guidance == "autoguidance") + f"-ch{self.guidance_channels}" * bool(
            self.guidance_channels
        )
        lowest, highest = self.guidance_interval
        return f"{steps}/{scale}" + f"-in{lowest:g}to{highest:g}" * (self.guidance_interval != (0.0, 1.0))

    @property
    def open_guidance_interval(self) -> tuple[float, float]:
        """The interval for `guidance`, open at 0 and 1: an adaptive solver looks beyond both."""
        lowest, highest = self.guidance_interval
        return (-math.inf if lowest == 0 else lowest, math.inf if highest == 1 else highest)

    def times(self) -> Tensor:
        """The num_steps + 1 times between which the steps go, the noise-free last step of an SDE included; float32.

        Every method but `dopri5`, which chooses its own between the first and the last, is evaluated at these alone.
        """
        end = 1 - self.last_step_size if self._closes else self.end
        grid = time_grid(self.num_steps - self._closes, start=self.start, end=end, shift=self.shift)
        return torch.cat([grid, grid.new_ones(1)]) if self._closes else grid

    def states(
        self, field: Field, x: Tensor, interpolant: Interpolant, noise: Noise, *, grid: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The states at every time of the grid, the start x (B, ...) first; `noise` is asked by an SDE only.

        Args:
            field: u(x, t).
            x: start, at the grid's first time.
            interpolant: gives an SDE the score.
            noise: noise(k) is the standard normal of noisy step k.
            grid: times to go through instead of `times()`, such as the end of it; at least two.
        """
        grid = (self.times() if grid is None else grid).to(x.device)
        if self.is_sde:
            return sde(
                field,
                x,
                grid[:-1] if self._closes else grid,
                interpolant,
                noise,
                diffusion=Diffusion(self.diffusion),
                corrector=self.method == "sde_heun",
                last_step=self.last_step,
            )
        return {"euler": euler, "heun": heun, "dopri5": dopri5}[self.method](field, x, grid)

    def run(self, field: Field, x: Tensor, interpolant: Interpolant, noise: Noise) -> Tensor:
        """The samples from noise x (B, ...); `noise` is asked by an SDE only."""
        return final(self.states(field, x, interpolant, noise))

    @property
    def _closes(self) -> bool:
        """Whether the last step is an SDE's noise-free one."""
        return self.is_sde and self.last_step != "none"


def _exact(value: float) -> str:
    """A number as short as it can be told from every other: 1.5, 2, 1.0000001."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
