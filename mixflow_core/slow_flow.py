"""Slow Flow, the paper's diagnostic of exposure bias, and the noise-level probe that answers it honestly.

The paper measures, for a state generated at sampling time t, the time m_t of the ground-truth interpolation nearest to
it, and finds m_t <= t, the more so the larger t. An error-free field shows the same when the interpolation leads to
another real image of the class (it measures diversity too), so the probe stands beside it: a regressor of the noise
level, read on generated states minus the same regressor read on true interpolations at the same t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixflow_core.interpolant import Interpolant


def slowed_time(x: Tensor, interpolant: Interpolant, *, x0: Tensor, x1: Tensor, resolution: int = 1000) -> Tensor:
    """m_t: the time of the point of the path from x0 to x1 nearest to x; all (B, ...), result (B,) in float64.

    On the linear path m = <x - x0, x1 - x0> / |x1 - x0|^2, which may leave [0, 1]; on curved paths the nearest of
    `resolution` + 1 evenly spaced times in [0, 1].
    """
    x, x0, x1 = (value.flatten(1).double() for value in (x, x0, x1))
    if interpolant.path == "linear":
        way = x1 - x0
        return ((x - x0) * way).sum(1) / way.square().sum(1)
    grid = torch.linspace(0, 1, resolution + 1, dtype=torch.float64, device=x.device)
    c = interpolant.coefficients(grid)
    # |x - alpha x1 - sigma x0|^2 without the term |x|^2, which does not depend on m.
    dots = [(a * b).sum(1, keepdim=True) for a, b in ((x, x1), (x, x0), (x1, x1), (x0, x0), (x1, x0))]
    distance = (
        -2 * c.alpha * dots[0]
        - 2 * c.sigma * dots[1]
        + c.alpha**2 * dots[2]
        + c.sigma**2 * dots[3]
        + 2 * c.alpha * c.sigma * dots[4]
    )
    return grid[distance.argmin(1)]


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of a quantity at each sampling time: `values[i][j]` is quantile `levels[j]` at time `times[i]`."""

    times: list[float]
    levels: list[float]
    values: list[list[float]]

    @classmethod
    def of(cls, rows: Tensor, times: Tensor, levels: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Quantiles:
        """From samples, rows (T, N), at times (T,)."""
        quantiles = torch.quantile(rows.double(), torch.tensor(levels, dtype=torch.float64), dim=1).T
        return cls(times.double().tolist(), list(levels), quantiles.tolist())


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
