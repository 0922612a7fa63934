"""Measures Slow Flow, its controls and the noise-level probe on a trained model.

One pairing serves all: a state that started at time s on the path from x0 to x1, a real image of its class, and went
on by the sampler to t > s, is read against that same path. From s = start it is the paper's rollout against a real
image of the same class, which measures posterior variance and diversity as well as error; from a later s it is the
continuation of a real pair. The same is measured with the error-free field of the training images where it is defined.

A sampler of n network evaluations a sample costs about n (1 + 2/3 + 1/3) and one for each of up to ten reading times:
50 a pair for Euler of 20 steps, 24 for the SDE of 8. Of 250 pairs that is 18,500; a training of 500,000 steps of 256
images, three evaluations' worth each, is 384,000,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixflow_core.exact import EmpiricalField, UndefinedFieldError
from mixflow_core.guidance import ConditionalModel
from mixflow_core.interpolant import Interpolant, PathName
from mixflow_core.rng import generator
from mixflow_core.samplers import Field, Noise, Sampler, time_grid
from mixflow_core.slow_flow import NoiseLevelProbe, Quantiles, slowed_time, velocity_deficit
from mixflow_core.statistics import Interval, share_interval, student_interval
from workers.config import RunConfig
from workers.data import ImageSet
from workers.sample import sampling_field, start_noise

PROBE_STEPS = 600
MOST_TIMES = 10  # at which states are read
CONTINUED_FROM = (1 / 3, 2 / 3)  # shares of the sampler's steps
MOST_NUMBERS = 2**26  # of the images of an error-free field, 8 bytes each


@dataclass(frozen=True)
class Pairs:
    """A batch of paths from noise to real images of its classes.

    Attributes:
        x0: noise, (B, C, H, W).
        x1: images, of x0's shape.
        y: classes (B,).
        indices: of the images among all, which key the SDE's noise.
    """

    x0: Tensor
    x1: Tensor
    y: Tensor
    indices: range


def new_probe(in_channels: int, image_size: int) -> NoiseLevelProbe:
    """The probe for images (C, H, H), untrained."""
    return NoiseLevelProbe(in_channels, stride=2 if image_size > 8 else 1)


def train_probe(path: PathName, data: ImageSet) -> NoiseLevelProbe:
    """Trains the probe on true interpolations of the training images, always the same way."""
    interpolant, probe = Interpolant(path), new_probe(*data.shape[:2])
    numbers = generator(0, "eval", 1)
    for parameter in probe.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter, generator=numbers)
        else:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(probe.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=PROBE_STEPS)
    for _ in range(PROBE_STEPS):
        rows = torch.randint(len(data.labels), (256,), generator=numbers)
        x1 = data.x1(rows.numpy())
        t = torch.rand(256, generator=numbers)
        x_t = interpolant.interpolate(x0=torch.randn(x1.shape, generator=numbers), x1=x1, t=t)
        (probe(x_t) - t).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def measure_slow_flow(
    model: nn.Module,
    run: RunConfig,
    data: ImageSet,
    probe: nn.Module,
    samplers: Sequence[Sampler],
    *,
    num_samples: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    guide: nn.Module | None = None,
) -> dict[str, Any]:
    """Slow Flow of a model (nearest ground-truth time of generated states), its controls and the probe.

    Args:
        model: (x, t, y) -> prediction.
        run: its configuration.
        data: the training images.
        probe: of the noise level, see train_probe.
        samplers: by which states are generated, guided as they say.
        num_samples: pairs, at least 2.
        batch_size: of one network call.
        seed: of pairs, starting noise and the SDE's noise.
        device: where to compute.
        guide: the weaker model of autoguidance.

    Returns:
        Plain JSON: `num_samples`, `num_images` (of the training data) and `samplers`: by name, `model` and
        `error_free`, each with what `_summary` says; `error_free` is a text that says why where it was left out.
    """
    present = np.unique(data.labels)  # a caption of the held-out images may have no training image
    numbers = torch.arange(num_samples)  # every class in turn, or of more classes than pairs some from all over
    spread = num_samples < len(present)
    labels = torch.from_numpy(present)[numbers * len(present) // num_samples if spread else numbers % len(present)]
    chosen = _same_class(data, labels, seed)
    probe = probe.to(device)

    def read(network: ConditionalModel, its: RunConfig, sampler: Sampler, guide: ConditionalModel | None) -> Any:
        parts = []
        for first in range(0, num_samples, batch_size):
            rows = range(first, min(first + batch_size, num_samples))
            x1 = data.x1(chosen[first : rows.stop].numpy()).to(device)
            pairs = Pairs(start_noise(run, seed, rows).to(device), x1, labels[first : rows.stop].to(device), rows)
            field = sampling_field(network, its, pairs.y, sampler, guide)
            parts.append(_read(field, sampler, Interpolant(run.path), pairs, probe, seed))
        return _summary(sampler, {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]})

    exact = _error_free(run, data, device)
    of_velocity = run.model_copy(update={"prediction": "velocity"})
    found: dict[str, Any] = {}
    for sampler in samplers:
        error_free: Any
        if isinstance(exact, str):
            error_free = exact
        elif sampler.guidance == "autoguidance" and sampler.guidance_scale != 1:
            error_free = "the weaker model of autoguidance is a network, which has no error-free counterpart"
        else:
            try:
                error_free = read(exact, of_velocity, sampler, None)
            except UndefinedFieldError as error:
                error_free = str(error)
        found[sampler.name] = {"model": read(model, run, sampler, guide), "error_free": error_free}
    return {"num_samples": num_samples, "num_images": len(data.labels), "samplers": found}


def _error_free(run: RunConfig, data: ImageSet, device: torch.device) -> EmpiricalField | str:
    """The exact field of the training images, or why there is none."""
    count, size = len(data.labels), int(np.prod(data.shape))
    if count * size > MOST_NUMBERS:
        return (
            f"the error-free field keeps all images, at most {MOST_NUMBERS:,} numbers; {count:,} images of {size:,} "
            "are more"
        )
    x1, y = data.x1(slice(None)).to(device), torch.from_numpy(data.labels.copy())
    return EmpiricalField(x1, y, Interpolant(run.path), run.model.null_label)


def _read(
    field: Field, sampler: Sampler, interpolant: Interpolant, pairs: Pairs, probe: nn.Module, seed: int
) -> dict[str, Tensor]:
    """What is read off one batch: rows (times, B), by name."""
    grid, places = _grid(sampler)
    field = _Remembering(field)
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, values: Tensor) -> None:
        found.setdefault(name, []).append(values.double().cpu())

    def look(state: Tensor, place: int) -> None:
        """A state of the rollout from x0, beside the true one of its pair."""
        t = grid[place].to(state).expand(len(state))
        true = interpolant.interpolate(x0=pairs.x0, x1=pairs.x1, t=t)
        if place:
            keep("probe", probe(state))
            keep("probe_true", probe(true))
        if place < places[-1]:
            for name, velocity in (
                ("u_true", field(true, t)),
                ("u_generated", field(state, t)),  # last, since the sampler asks for the same next
                ("v", interpolant.velocity(x0=pairs.x0, x1=pairs.x1, t=t)),
            ):
                keep(name, velocity.double().square().flatten(1).sum(1))

    for start in (0, *_starts(grid, places)):
        t = grid[start].to(pairs.x0).expand(len(pairs.x0))
        x = interpolant.interpolate(x0=pairs.x0, x1=pairs.x1, t=t) if start else pairs.x0
        noise = _noise(seed, pairs)
        for place, state in enumerate(sampler.states(field, x, interpolant, noise, grid=grid[start:]), start):
            if place in places and place > start:
                keep(f"m{start}", slowed_time(state, interpolant, x0=pairs.x0, x1=pairs.x1))
            if start == 0 and place in (0, *places):
                look(state, place)
    return {name: torch.stack(rows) for name, rows in found.items()}


class _Remembering:
    """A field that does not compute anew what it was asked for just before, at the same state and time."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The field at x."""
        if self.last is None or self.last[0] is not x or not torch.equal(self.last[1], t):
            self.last = (x, t, self.field(x, t))
        return self.last[2]


def _summary(sampler: Sampler, rows: dict[str, Tensor]) -> dict[str, Any]:
    """Of one field and sampler, plain JSON; intervals are of 95 % over pairs.

    `same_class`: quantiles of m_t of rollouts from x0. `slowed`: the share with m_t <= t, [share, low, high] at each of
    its times. `continuation`: quantiles of m_t from the true x_s on, for each s, `from`. `probe`: quantiles of the
    probe on generated states minus its mean on true interpolations at t, that mean taken as known. `probe_lag`: the
    mean of the same difference, [mean, low, high], paired; below 0 the state is noisier than it should be.
    `deficit_generated`, `deficit_true`: velocity_deficit at the times `deficit_times` at which the sampler calls the
    field, [deficit, low, high]; a guided field is meant as it is guided.
    """
    grid, places = _grid(sampler)
    times = grid[torch.tensor(places)]
    n, m = rows["v"].shape[1], rows["m0"]
    counts = (m <= times[:, None]).sum(1).tolist()
    lags = rows["probe"] - rows["probe_true"]
    of_v = list(zip(rows["u_generated"], rows["u_true"], rows["v"], strict=True))
    return {
        "same_class": asdict(Quantiles.of(m, times)),
        "slowed": [[count / n, *share_interval(count, n)] for count in counts],
        "continuation": [
            {"from": float(grid[s]), **asdict(Quantiles.of(rows[f"m{s}"], times[-len(rows[f"m{s}"]) :]))}
            for s in _starts(grid, places)
        ],
        "probe": asdict(Quantiles.of(rows["probe"] - rows["probe_true"].mean(1, keepdim=True), times)),
        "probe_lag": [_ends(student_interval(lag.tolist())) for lag in lags],
        "deficit_times": grid[torch.tensor([0, *places[:-1]])].double().tolist(),
        "deficit_generated": [_ends(velocity_deficit(generated, v)) for generated, _, v in of_v],
        "deficit_true": [_ends(velocity_deficit(true, v)) for _, true, v in of_v],
    }


def _ends(interval: Interval) -> list[float]:
    return [interval.mean, interval.low, interval.high]


def _grid(sampler: Sampler) -> tuple[Tensor, list[int]]:
    """The times that a sampler goes through, and the places among them at which states are read, the last included."""
    grid = sampler.times()
    if sampler.method == "dopri5":  # it chooses its own steps: these only say where it is looked at
        grid = time_grid(2 * MOST_TIMES, start=sampler.start, end=sampler.end, shift=sampler.shift)
    last = len(grid) - 1
    count = min(last, MOST_TIMES)
    return grid, [round(last * (k + 1) / count) for k in range(count)]


def _starts(grid: Tensor, places: list[int]) -> list[int]:
    """The places from which pairs are continued; none where they would be the first or the last."""
    found = {round(share * (len(grid) - 1)) for share in CONTINUED_FROM}
    return sorted(found - {0, places[-1]})


def _noise(seed: int, pairs: Pairs) -> Noise:
    """The SDE's noise, which depends on the image's index alone."""
    shape, generators = pairs.x0.shape[1:], [generator(seed, "sde_noise", i) for i in pairs.indices]
    return lambda step: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(pairs.x0)


def _same_class(data: ImageSet, labels: Tensor, seed: int) -> Tensor:
    """The row of one real image of its class for each label."""
    of_class = torch.from_numpy(data.labels.copy())
    numbers = generator(seed, "pairing", 0)
    chosen = torch.empty_like(labels)
    for label in labels.unique():
        candidates, wanted = torch.nonzero(of_class == label)[:, 0], labels == label
        chosen[wanted] = candidates[torch.randint(len(candidates), (int(wanted.sum()),), generator=numbers)]
    return chosen
