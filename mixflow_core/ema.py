"""Exponential moving average of parameters, with warm-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def warm_decay(decay: float, step: int) -> float:
    """Decay of update number `step` (1, 2, ...): min(decay, (1 + step) / (10 + step)).

    Without the warm-up an average that starts at untrained weights keeps them: at 0.999 half of them after 700 steps.
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Averages of named parameters: shadow <- d shadow + (1 - d) parameter, d = warm_decay(decay, step).

    Args:
        parameters: name -> parameter; the average starts equal to them.
        decay: in [0, 1); 0 follows the parameters exactly.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """One update after optimiser step number `step` >= 1; `parameters` in the order given at construction."""
        torch._foreach_lerp_(list(self.shadow.values()), list(parameters), 1 - warm_decay(self.decay, step))
