"""Measures Slow Flow and the noise-level probe on a trained model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixflow_core.interpolant import Interpolant, PathName
from mixflow_core.loss import times_defined
from mixflow_core.rng import generator
from mixflow_core.samplers import euler, sde, time_grid
from mixflow_core.slow_flow import NoiseLevelProbe, Quantiles, slowed_time
from workers.config import RunConfig
from workers.data import ImageSet
from workers.sample import sampling_field, start_noise

ODE_STEPS = 20
SDE_STEPS = 8
PROBE_STEPS = 600


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
    probe: NoiseLevelProbe,
    *,
    num_samples: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Slow Flow of a model (method.md: nearest ground-truth time of generated states) and what the probe says.

    Returns:
        Plain JSON. `slowed_time`: quantiles of m_t at each sampling time t, of full Euler rollouts against a real image
        of the same class. `probe_ode`, `probe_sde`: quantiles over samples of the probe on the generated state minus
        its mean on true interpolations at the same t; negative values are a lag. `share_slowed`: the share of (state,
        t) with m_t <= t.
    """
    interpolant, indices = Interpolant(run.path), range(num_samples)
    present = torch.from_numpy(np.unique(data.labels))  # a caption of the held-out images may have no training image
    labels = present[torch.arange(num_samples) % len(present)]
    x0 = start_noise(run, seed, indices)
    x1 = _same_class(data, labels, seed)
    field = sampling_field(model, run, labels.to(device))

    start, end = times_defined(run.path, run.prediction)
    grid = time_grid(ODE_STEPS, start=start, end=end)
    times = grid[1:]
    states = [state.cpu() for state in euler(field, x0.to(device), grid.to(device))][1:]
    slowed = torch.stack([slowed_time(state, interpolant, x0=x0, x1=x1) for state in states])

    noise = generator(seed, "sde_noise", 0)
    sde_times = time_grid(SDE_STEPS, start=start, end=0.96)
    sde_states = sde(
        field,
        x0.to(device),
        sde_times.to(device),
        interpolant,
        lambda k: torch.randn(x0.shape, generator=noise).to(device),
        last_step="none",
    )
    return {
        "num_samples": num_samples,
        "share_slowed": float((slowed <= times[:, None]).double().mean()),
        "slowed_time": asdict(Quantiles.of(slowed, times)),
        "probe_ode": asdict(_lag(probe, states, times, interpolant, x0, x1)),
        "probe_sde": asdict(_lag(probe, [s.cpu() for s in sde_states][1:], sde_times[1:], interpolant, x0, x1)),
    }


def _same_class(data: ImageSet, labels: Tensor, seed: int) -> Tensor:
    """One real image of its class for each label."""
    of_class = torch.from_numpy(data.labels.copy())
    numbers = generator(seed, "pairing", 0)
    chosen = torch.empty_like(labels)
    for label in labels.unique():
        candidates, wanted = torch.nonzero(of_class == label)[:, 0], labels == label
        chosen[wanted] = candidates[torch.randint(len(candidates), (int(wanted.sum()),), generator=numbers)]
    return data.x1(chosen.numpy())


def _lag(
    probe: NoiseLevelProbe, states: list[Tensor], times: Tensor, interpolant: Interpolant, x0: Tensor, x1: Tensor
) -> Quantiles:
    rows = []
    for state, t in zip(states, times, strict=True):
        true = interpolant.interpolate(x0=x0, x1=x1, t=t.expand(len(x0)))
        rows.append(probe(state) - probe(true).mean())
    return Quantiles.of(torch.stack(rows), times)
