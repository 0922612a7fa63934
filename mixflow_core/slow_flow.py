"""Slow Flow, the paper's diagnostic of exposure bias, and beside it what answers more honestly.

The paper measures, for a state generated at sampling time t, the time m_t of the ground-truth interpolation nearest to
it, and finds m_t <= t, the more so the larger t. Which interpolation decides what that measures:

- to another real image of the class: posterior variance and diversity too. An error-free field shows the same lag.
- to the image of the pair whose true x_s the sampler went on from: the flow-matching loss. A step of length h loses
  h (1 - <u, v> / |v|^2), and an error-free field loses by the posterior variance that is left.

An SDE forgets its starting noise on the way, which by itself brings m_t above t. None of these lags is an error of the
model until the error-free field's own is set beside it (`exact`), and the quantiles of 1 - m_t / t recommend no slowing
range gamma: they suggest one where slowing harms.

The noise-level probe, a regressor of the time read on generated states minus the same read on true interpolations at
that t, is 0 for an error-free field and exact sampling; few steps of an SDE make an error-free field lag too. The
velocity deficit is how much smaller the field is than the velocities it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixflow_core.interpolant import Interpolant
from mixflow_core.statistics import Interval, quantile_ranks, ratio_interval

_GOLDEN = (5**0.5 - 1) / 2


def slowed_time(x: Tensor, interpolant: Interpolant, *, x0: Tensor, x1: Tensor, resolution: int = 1000) -> Tensor:
    """m_t: the time of the point of the path from x0 to x1 nearest to x; all (B, ...), result (B,) in float64.

    On the linear path m = <x - x0, x1 - x0> / |x1 - x0|^2, which may leave [0, 1]. On curved paths the nearest of
    `resolution` + 1 evenly spaced times in [0, 1], then a golden-section search between its neighbours, to 1e-6.
    """
    x, x0, x1 = (value.flatten(1).double() for value in (x, x0, x1))
    if interpolant.path == "linear":
        way = x1 - x0
        return ((x - x0) * way).sum(1) / way.square().sum(1)
    dots = [(a * b).sum(1, keepdim=True) for a, b in ((x, x1), (x, x0), (x1, x1), (x0, x0), (x1, x0))]

    def distance(m: Tensor) -> Tensor:
        """|x - alpha x1 - sigma x0|^2 without the term |x|^2, which does not depend on m."""
        c = interpolant.coefficients(m)
        linear = c.alpha * dots[0] + c.sigma * dots[1]
        square = c.alpha**2 * dots[2] + c.sigma**2 * dots[3]
        return square + 2 * c.alpha * c.sigma * dots[4] - 2 * linear

    grid = torch.linspace(0, 1, resolution + 1, dtype=torch.float64, device=x.device)
    nearest = distance(grid).argmin(1, keepdim=True)
    low, high = grid[(nearest - 1).clamp(min=0)], grid[(nearest + 1).clamp(max=resolution)]
    for _ in range(40):  # each keeps .618 of the bracket: 40 leave 1e-8 of it
        inner = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        lower = distance(inner[0]) <= distance(inner[1])
        low, high = torch.where(lower, low, inner[0]), torch.where(lower, inner[1], high)
    return ((low + high) / 2)[:, 0]


def velocity_deficit(u: Tensor, v: Tensor) -> Interval:
    """1 - E|u|^2 / E|v|^2 with its interval: by how much less energy a field has than the velocities it learns from.

    v = alpha' x1 + sigma' x0 are the training targets of the pairs and u the field at states of the same time. The
    minimiser of the flow-matching loss is E[v | x_t], so by Jensen's inequality its deficit on true x_t is not 0 but
    its own relative loss, E|u - v|^2 / E|v|^2. ("The Velocity Deficit", arXiv 2605.14819, names the smaller magnitude
    and takes it for a cause of samples that fall short.) What speaks of a model is a difference to the error-free
    field's. One between generated and true states says that those differ, by the model's error or the sampler's steps.

    Args:
        u: |u|^2 of each sample, (n,), n >= 2.
        v: |v|^2 of the pair that it was sampled with, (n,).
    """
    ratio = ratio_interval(u, v)
    return Interval(1 - ratio.mean, 1 - ratio.high, 1 - ratio.low, ratio.sd, ratio.n)


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of a quantity at each sampling time: `values[i][j]` is quantile `levels[j]` at time `times[i]`.

    `low` and `high` are the ends of its 95 % interval over independent samples, order statistics that hold for any law;
    None where there are too few samples for that end.
    """

    times: list[float]
    levels: list[float]
    values: list[list[float]]
    low: list[list[float | None]]
    high: list[list[float | None]]

    @classmethod
    def of(cls, rows: Tensor, times: Tensor, levels: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Quantiles:
        """From samples, rows (T, N), at times (T,)."""
        ordered, n = rows.double().sort(dim=1).values, rows.shape[1]
        ranks = [quantile_ranks(n, level) for level in levels]
        # torch.quantile takes no more than 16 million numbers.
        values = [_between(ordered, level * (n - 1)).tolist() for level in levels]
        low, high = ([_at(ordered, rank[end]) for rank in ranks] for end in (0, 1))
        columns = ([list(row) for row in zip(*found, strict=True)] for found in (values, low, high))
        return cls(times.double().tolist(), list(levels), *columns)


def _between(ordered: Tensor, place: float) -> Tensor:
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


def _at(ordered: Tensor, rank: int | None) -> list[float | None]:
    return [None] * len(ordered) if rank is None else ordered[:, rank].tolist()


class NoiseLevelProbe(nn.Module):
    """Regresses the time t from x_t alone, (B, C, H, W) -> (B,): two convolutions, pooled first and second moments.

    Args:
        in_channels: C.
        stride: of both convolutions; 2 makes sides above 8 cheap, where there are places enough to pool over.
        width: channels of the convolutions.
    """

    def __init__(self, in_channels: int, *, stride: int = 1, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=stride, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=stride, padding=1),
            nn.SiLU(),
        )
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Estimated t, unbounded."""
        features = self.features(x).flatten(2)
        return self.head(torch.cat([features.mean(2), features.square().mean(2)], 1))[:, 0]
