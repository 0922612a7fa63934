"""One metric of two arms: which is better, by how much, how surely, and which recall belongs beside it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from mixflow_core.statistics import Interval, nested_interval, pairs_needed
from orchestration.titles import lower_is_better

Call = Literal["better", "worse", "inconclusive"]
WITHOUT_RECALL = ("fd_patches", "clip_score")  # no features whose neighbourhoods recall could count


def higher_is_better(metric: str) -> bool:
    """The better direction by the metric's name: up for precision, recall, Inception and CLIP score, else down."""
    return lower_is_better(metric) is False


def recall_of(metric: str) -> str:
    """The recall in the features that a metric reads: recall_X for fd_X and kid_X, else FID-Inception's recall."""
    kind, _, extractor = metric.partition("_")
    has_own = kind in ("fd", "kid", "precision", "recall") and extractor and metric not in WITHOUT_RECALL
    return f"recall_{extractor}" if has_own else "recall"


def recall_beside(metric: str, measured: Collection[str]) -> str:
    """The recall that the rule reads: the metric's own; the plain one if there is no other; any if it has none.

    Raises:
        ValueError: the metric or such a recall was not measured.
    """
    if metric not in measured:
        raise ValueError(f"evaluation.primary must be of a metric that was measured, {sorted(measured)}, got {metric}")
    recalls = sorted(name for name in measured if name == "recall" or name.startswith("recall_"))
    if recall_of(metric) in recalls:
        return recall_of(metric)
    if recalls and (metric in WITHOUT_RECALL or recalls == ["recall"]):
        return recalls[0]
    raise ValueError(
        f"evaluation.primary must be of a metric with {recall_of(metric)} beside it, got {metric} beside {recalls}; "
        "measure that too (an .npz needs its images, arr_0), declare another, or set judged of the arms to false"
    )


def call(metric: str, interval: Interval) -> Call:
    """What a difference to a control says: nothing while its interval covers zero."""
    sign = -1 if higher_is_better(metric) else 1
    low, high = sorted((sign * interval.low, sign * interval.high))
    return "better" if high < 0 else "worse" if low > 0 else "inconclusive"


def difference(
    metric: str,
    arm: Sequence[Sequence[float]],
    control: Sequence[Sequence[float]],
    *,
    effect: float | None = None,
    step: float = 0.0,
) -> dict[str, Any]:
    """An arm minus its control in one cell, as plain JSON. A single pair has no interval: `low`, `high`, `sd` are None.

    Args:
        metric: decides which side of zero is better.
        arm: values by base and seed, `arm[b][k]`.
        control: values at the same bases and seeds.
        effect: the difference worth seeing, as a share of the control's mean.
        step: in which the metric moves, 1 / N for a share of N images: differences that are equal by chance do not
            vary less than that.

    Returns:
        The Interval over the seeds of one base, or over several bases; `bases`, their number; the `call`; `less_than`,
        the effect where the interval lies within it, else None; and `pairs_needed` to see the effect in four of five
        experiments, counted in what the interval counts. That is None where no effect is asked for, where it is 0
        because the control's mean is, and where it takes more than the most replicates there may be.
    """
    pairs = [[x - y for x, y in zip(a, c, strict=True)] for a, c in zip(arm, control, strict=True)]
    if sum(map(len, pairs)) == 1:
        return {**spread(pairs), "call": "inconclusive", "less_than": None, "pairs_needed": None}
    interval = nested_interval(pairs, least_sd=step)
    size = (effect or 0) * abs(_mean([_mean(seeds) for seeds in control]))
    needed = pairs_needed(interval.sd, size) if size else None
    is_less = size > 0 and -size < interval.low and interval.high < size
    return {
        **asdict(interval),
        "bases": len(pairs),
        "call": call(metric, interval),
        "less_than": effect if is_less else None,
        "pairs_needed": needed,
    }


def spread(values: Sequence[Sequence[float]], step: float = 0.0) -> dict[str, Any]:
    """The Interval of values by base and seed, and the number of bases, as plain JSON; one value has no bounds."""
    if sum(map(len, values)) == 1:
        return {"mean": values[0][0], "low": None, "high": None, "sd": None, "n": 1, "bases": 1}
    return {**asdict(nested_interval(values, least_sd=step)), "bases": len(values)}


def is_of_one_base(found: Mapping[str, Any], bases: int) -> bool:
    """Whether an interval speaks of the first base alone where an experiment has several."""
    return bases > 1 and bool(found) and found.get("bases", bases) == 1


def unit_of(found: Mapping[str, Any], bases: int) -> str:
    """What an interval counts, of an experiment with so many bases: `bases` or `pairs`."""
    return "bases" if bases > 1 and not is_of_one_base(found, bases) else "pairs"


def counted(found: Mapping[str, Any], bases: int) -> str:
    """What an interval is over, of an experiment with so many bases: `3 seeds`, `4 bases`, `base 0 alone, 2 seeds`."""
    alone = is_of_one_base(found, bases)
    unit = "base" if bases > 1 and not alone else "seed"
    return f"{'base 0 alone, ' if alone else ''}{found['n']} {unit}{'s' if found['n'] != 1 else ''}"


Agreement = Literal["agrees", "disagrees", "inconclusive"]


def agreement(expected: str, found: Mapping[str, Any], bound: float) -> Agreement:
    """What a difference says of a publication's claim.

    Args:
        expected: `better` or `worse`, which the difference's call confirms or contradicts; or `equal`, which is
            confirmed where its interval lies within +-bound, and contradicted where it lies outside: not to be told
            apart is no evidence of being equal.
        found: of `difference`.
        bound: of `equal`, in the metric's units.
    """
    if found["low"] is None:
        return "inconclusive"
    if expected == "equal":
        if -bound <= found["low"] and found["high"] <= bound:
            return "agrees"
        return "disagrees" if found["low"] > bound or found["high"] < -bound else "inconclusive"
    if found["call"] == "inconclusive":
        return "inconclusive"
    return "agrees" if found["call"] == expected else "disagrees"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
