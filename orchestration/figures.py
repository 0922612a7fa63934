"""Plots of results as PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.page import COLOURS, picture
from orchestration.titles import lower_is_better, short_title

METHODS = ("sde_heun", "dopri5", "euler", "heun", "sde")
STYLES = {"euler": "o-", "heun": "s", "sde": "^"}
# Methods share an NFE: a little room between them, on a logarithmic axis, keeps their bars apart.
SHIFTS = {"euler": 1.0, "heun": 1.06, "sde": 0.94}
TICKS_APART = 1.25  # least ratio of two ticks of NFE
LINE, ERROR_FREE = "#1f77b4", "#d62728"
Curve = Sequence[tuple[int, float]]  # (step, value)


def metric_curves(
    arms: Mapping[str, Any], metrics: Sequence[str], nfe: Mapping[str, int], colours: Mapping[str, str]
) -> bytes:
    """Every metric against the number of network evaluations of the unguided samplers, one line an arm and method.

    Cells of the first of several bases alone are open markers outside the lines.

    Args:
        arms: name -> its part of a summary.
        metrics: what to draw, a panel each.
        nfe: network evaluations of an image by cell.
        colours: of the arms.
    """
    lines: dict[str, list[str]] = {}
    for cell in nfe:
        if _is_unguided(cell):
            lines.setdefault(_family(cell), []).append(cell)

    ticks: list[float] = []
    for number in sorted(nfe[cell] for cells in lines.values() for cell in cells):
        if not ticks or number >= TICKS_APART * ticks[-1]:
            ticks.append(number)
    bases = {
        name: max((found.get("bases", 1) for cell in arm["metrics"].values() for found in cell.values()), default=1)
        for name, arm in arms.items()
    }

    def draw(figure: Any) -> None:
        for axis, metric in zip(_panels(figure, len(metrics)), metrics, strict=False):
            for name, arm in arms.items():
                for family, cells in lines.items():
                    cells = sorted(
                        (c for c in cells if metric in arm["metrics"].get(c, {})), key=lambda cell: nfe[cell]
                    )
                    x = [nfe[cell] * SHIFTS.get(family, 1.12) for cell in cells]
                    label = f"{name} ({family})" if metric == metrics[0] else None
                    points = [(place, arm["metrics"][cell][metric]) for place, cell in zip(x, cells, strict=True)]
                    whole = [point for point in points if point[1].get("bases", 1) == bases[name]]
                    alone = [point for point in points if point not in whole]
                    style = STYLES.get(family, "D")
                    _draw_points(axis, whole, fmt=style, color=colours[name], label=label)
                    _draw_points(axis, alone, fmt=style[0], color=colours[name], mfc="none")
            _dress(axis, short_title(metric), "network evaluations")
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        if lines:
            figure.legend(loc="outside lower center", ncols=4, fontsize=7)

    return picture(draw, _size(len(metrics)))


def count_curves(arms: Mapping[str, Any], cell: str, colours: Mapping[str, str]) -> bytes | None:
    """Distances in one cell by the number of samples, a panel each, in the band that seeds span; None without any.

    Frechet distances of few samples are biased upwards: only numbers of equal counts compare.
    """
    counts = {name: arm.get("by_count", {}).get(cell, {}) for name, arm in arms.items()}
    metrics = list(dict.fromkeys(m for found in counts.values() for m, rows in found.items() if rows))
    metrics = [metric for metric in metrics if lower_is_better(metric) is not False]
    if not metrics:
        return None

    def draw(figure: Any) -> None:
        for axis, metric in zip(_panels(figure, len(metrics)), metrics, strict=False):
            for name, found in counts.items():
                x, y, low, high = zip(*found[metric], strict=True) if found.get(metric) else ((),) * 4
                axis.fill_between(x, low, high, color=colours[name], alpha=0.15, lw=0)
                axis.plot(x, y, "o-", color=colours[name], ms=3, lw=1.2, label=name if metric == metrics[0] else None)
            numbers = sorted({count for found in counts.values() for count, *_ in found.get(metric, [])})
            axis.set_xscale("log")
            axis.set_xticks(numbers, [str(count) for count in numbers])
            axis.minorticks_off()
            _dress(axis, short_title(metric), "samples")
        figure.legend(loc="outside lower center", ncols=4, fontsize=7)

    return picture(draw, _size(len(metrics)))


def training_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]], colours: Mapping[str, str]) -> bytes:
    """A panel a metric, a line an arm: the mean over its seeds, in the band that they span.

    Args:
        curves: metric key -> arm -> the curve of each seed.
        colours: of the arms.
    """

    def draw(figure: Any) -> None:
        for axis, (key, by_arm) in zip(_panels(figure, len(curves)), curves.items(), strict=False):
            for name, seeds in by_arm.items():
                values: dict[int, list[float]] = {}
                for step, value in (point for curve in seeds for point in curve):
                    values.setdefault(step, []).append(value)
                steps = sorted(values)
                means = [math.fsum(values[step]) / len(values[step]) for step in steps]
                style = {"color": colours[name], "lw": 1.3, "marker": "o" if len(steps) < 10 else None, "ms": 4}
                axis.plot(steps, means, **style, label=name if key == next(iter(curves)) else None)
                low, high = ([extreme(values[step]) for step in steps] for extreme in (min, max))
                axis.fill_between(steps, low, high, color=colours[name], alpha=0.15, lw=0)
            _dress(axis, key, "step")
        figure.legend(loc="outside lower center", ncols=6, fontsize=7)

    return picture(draw, (12, 4.2))


def slow_flow_plot(columns: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG of what `measure_slow_flow` read of a model with a sampler, a column each; the error-free field's is dashed.

    Rows: m_t of rollouts against a real image of the class; m_t of real pairs continued from s, a colour each; the
    probe's lag; the velocity deficit on generated and on true states. Bands of the first and third hold the middle 50
    and 90 % of samples, those of the others a 95 % interval.

    Args:
        columns: title -> `model` and `error_free` of one sampler.
    """
    rows = (
        (_draw_rollouts, "m, rollout against a\nreal image of its class"),
        (_draw_continued, "m, real pairs\ncontinued from s"),
        (_draw_lag, "noise-level probe,\ngenerated minus true"),
        (_draw_deficits, "velocity deficit\n1 - E|u|^2 / E|v|^2"),
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(rows), len(columns), sharey="row", squeeze=False)
        for row, (drawn, title) in enumerate(rows):
            for axis, (name, found) in zip(axes[row], columns.items(), strict=True):
                drawn(axis, found["model"], "-")
                if not isinstance(found["error_free"], str):
                    drawn(axis, found["error_free"], "--")
                axis.set_title(name if row == 0 else "", fontsize=9)
                axis.tick_params(labelsize=7)
                axis.grid(alpha=0.25)
            axes[row][0].set_ylabel(title, fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel("sampling time t (0 noise, 1 data)", fontsize=8)
            axis.legend(fontsize=7)

    return picture(draw, (max(3.4 * len(columns), 4), 10))


def _draw_rollouts(axis: Any, found: Mapping[str, Any], line: str) -> None:
    axis.plot([0, 1], [0, 1], "k:", lw=0.8)
    _draw_quantiles(axis, found["same_class"], line)


def _draw_lag(axis: Any, found: Mapping[str, Any], line: str) -> None:
    axis.plot([0, 1], [0, 0], "k:", lw=0.8)
    _draw_quantiles(axis, found["probe"], line)


def _draw_quantiles(axis: Any, q: Mapping[str, Any], line: str) -> None:
    """Median and the bands of the middle 90 and 50 %; of the error-free field the band's ends alone."""
    t, values = q["times"], list(zip(*q["values"], strict=True))
    axis.plot(t, values[2], line, color=LINE if line == "-" else ERROR_FREE, lw=1.5)
    if line == "-":
        axis.fill_between(t, values[0], values[-1], alpha=0.2, color=LINE, lw=0)
        axis.fill_between(t, values[1], values[-2], alpha=0.35, color=LINE, lw=0)
    else:
        for end in (values[0], values[-1]):
            axis.plot(t, end, line, color=ERROR_FREE, lw=0.7)


def _draw_continued(axis: Any, found: Mapping[str, Any], line: str) -> None:
    axis.plot([0, 1], [0, 1], "k:", lw=0.8)
    for part, colour in zip(found["continuation"], COLOURS, strict=False):
        t, middle = part["times"], len(part["levels"]) // 2
        median, low, high = ([row[middle] for row in part[key]] for key in ("values", "low", "high"))
        axis.plot([part["from"], *t], [part["from"], *median], line, color=colour, lw=1.3)
        if line == "-" and None not in (*low, *high):  # a median of fewer than six samples has no interval
            axis.fill_between(t, low, high, alpha=0.3, color=colour, lw=0)


def _draw_deficits(axis: Any, found: Mapping[str, Any], line: str) -> None:
    whose = "" if line == "-" else ", error-free"
    for key, colour in (("deficit_generated", LINE), ("deficit_true", ERROR_FREE)):
        value, low, high = zip(*found[key], strict=True)
        label = f"on {key.removeprefix('deficit_')} states{whose}"
        axis.plot(found["deficit_times"], value, line, color=colour, lw=1.3, label=label)
        axis.fill_between(found["deficit_times"], low, high, alpha=0.2, color=colour, lw=0)


def sweep_plot(answer: Mapping[str, Any], keys: Sequence[str]) -> bytes:
    """PNG of the objective against each swept key, with the controls as lines.

    Args:
        answer: a sweep's trials and controls.
        keys: that were swept.
    """
    marks = {
        "finished": ("o", "#1f77b4"),
        "pruned": ("x", "#7f7f7f"),
        "running": ("+", "#7f7f7f"),
        "failed": ("v", "#d62728"),
    }

    def draw(figure: Any) -> None:
        for axis, key in zip(_panels(figure, len(keys)), keys, strict=False):
            for state, (mark, colour) in marks.items():
                there = [
                    (t["params"][key], t["objective"])
                    for t in answer["trials"]
                    if t["state"] == state and t["objective"] is not None and key in t["params"]
                ]
                if there:
                    x, y = zip(*[(v if isinstance(v, int | float) else str(v), o) for v, o in there], strict=True)
                    axis.scatter(x, y, marker=mark, color=colour, s=24, label=state if key == keys[0] else None)
            for control, style in zip(answer["controls"], ("--", ":"), strict=False):
                if control["objective"] is not None:
                    label = control["label"] if key == keys[0] else None
                    axis.axhline(control["objective"], color="#444444", ls=style, lw=1.2, label=label)
            _dress(axis, answer["objective"], key)
        figure.legend(loc="outside lower center", ncols=6, fontsize=7)

    return picture(draw, _size(len(keys)))


def times_plot(realised: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> bytes:
    """PNG of the laws of t, m and t - m as each arm drew them: densities over [0, 1]."""
    columns = (("t", "t, what the network is told"), ("m", "m, where the sample lies"), ("lag", "t - m, the slowing"))

    def draw(figure: Any) -> None:
        for axis, (key, title) in zip(figure.subplots(1, len(columns)), columns, strict=True):
            for name, found in realised.items():
                bins = len(found[key])
                density = [count * bins / found["num_draws"] for count in found[key]]
                axis.stairs(density, found["edges"], color=colours[name], label=name if key == "t" else None)
            _dress(axis, title, "")
        if realised:
            figure.legend(loc="outside lower center", ncols=6, fontsize=7)

    return picture(draw, (12, 3.2))


def _draw_points(axis: Any, points: Sequence[tuple[float, Any]], **style: Any) -> None:
    """Intervals at their places; a single pair has none, and no bar."""
    found = [interval for _, interval in points]
    error = [[0 if i[end] is None else abs(i["mean"] - i[end]) for i in found] for end in ("low", "high")]
    axis.errorbar([x for x, _ in points], [i["mean"] for i in found], error, capsize=2, ms=4, lw=1.2, **style)


def _is_unguided(cell: str) -> bool:
    return re.search(r"/s1(?![0-9.])", cell) is not None


def _family(cell: str) -> str:
    """A cell's method with whatever changes it but its number of steps: `euler20-shift2/s1` -> `euler-shift2`."""
    steps = cell.split("/")[0]
    method = next((name for name in METHODS if steps.startswith(name)), "")
    return method + steps[len(method) :].lstrip("0123456789")


def _panels(figure: Any, count: int) -> list[Any]:
    """At least `count` axes, five a row; those left over are not shown."""
    columns = min(count, 5)
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return axes


def _size(count: int) -> tuple[float, float]:
    return (3.4 * min(max(count, 2), 5), 3.4 * -(-count // 5) + 1)


def _dress(axis: Any, title: str, label: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
