"""Guidance: away from a model without the condition, or away from a weaker model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixflow_core.interpolant import broadcast

ConditionalModel = Callable[[Tensor, Tensor, Tensor], Tensor]


def classifier_free(
    model: ConditionalModel,
    y: Tensor,
    *,
    guidance_scale: float,
    null_label: int,
    num_channels: int | None = None,
    interval: tuple[float, float] = (-math.inf, math.inf),
) -> Callable[[Tensor, Tensor], Tensor]:
    """The field v_u + s (v_c - v_u), s = guidance_scale; one call evaluates the model on 2B rows, or B when s = 1.

    Args:
        model: (x, t, y) -> prediction, x (B, C, H, W), t (B,), y (B,) class labels.
        y: the labels to be guided towards, (B,).
        guidance_scale: 1 is the conditional model itself, unguided.
        null_label: the label that stands for no class.
        num_channels: guide only the first channels and leave the rest conditional (SiT's published samples guide 3 of
            4); None guides all.
        interval: guide at lowest <= t <= highest (closed, t = 0 is noise) and nowhere else. An adaptive solver looks
            beyond t = 1, where guidance that ended at 1 would break the field: an open end is inf.
    """
    if guidance_scale == 1:
        return lambda x, t: model(x, t, y)
    labels = torch.cat([y, torch.full_like(y, null_label)])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if _outside(t, interval):
            return model(x, t, y)
        conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        scale = 1 + _inside(t, interval, x) * (guidance_scale - 1)
        field = unconditional + scale * (conditional - unconditional)
        if num_channels is None:
            return field
        return torch.cat([field[:, :num_channels], conditional[:, num_channels:]], 1)

    return guided


def autoguided(
    main: ConditionalModel,
    guide: ConditionalModel,
    y: Tensor,
    *,
    guidance_scale: float,
    interval: tuple[float, float] = (-math.inf, math.inf),
) -> Callable[[Tensor, Tensor], Tensor]:
    """The field g + s (m - g), s = guidance_scale, m of the main model and g of a weaker guide, both told the label.

    One call evaluates each model on B rows, or the main model alone where nothing is guided.

    Args:
        main: (x, t, y) -> prediction, x (B, C, H, W), t (B,), y (B,) class labels.
        guide: the same of a smaller or less trained model, RAE's DiTDH-S beside its DiTDH-XL.
        y: the labels, (B,).
        guidance_scale: 1 is the main model itself, unguided.
        interval: guide at lowest <= t <= highest (closed, t = 0 is noise) and nowhere else, as in classifier_free.
    """
    if guidance_scale == 1:
        return lambda x, t: main(x, t, y)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        field = main(x, t, y)
        if _outside(t, interval):
            return field
        return field + _inside(t, interval, x) * (guidance_scale - 1) * (field - guide(x, t, y))

    return guided


def _outside(t: Tensor, interval: tuple[float, float]) -> bool:
    """Whether no sample can lie inside, so that one model is enough."""
    if interval == (-math.inf, math.inf):
        return False  # without waiting for a device
    return float(t.max()) < interval[0] or float(t.min()) > interval[1]


def _inside(t: Tensor, interval: tuple[float, float], like: Tensor) -> Tensor:
    """1 for the samples that are guided, else 0, shaped to multiply (B, ...)."""
    return broadcast(((t >= interval[0]) & (t <= interval[1])).to(like.dtype), like)
