"""Finished experiments side by side, from MLflow alone: one self-contained HTML, grouped by protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from orchestration.figures import metric_curves, training_curves
from orchestration.page import COLOURS, GENERATOR, data_uri, render
from orchestration.protocols import NOT_COMPARED, Difference, difference, fingerprint
from orchestration.report import metrics_of
from orchestration.tracked import CURVES, TrackedExperiment, TrackedSeed

COST = {
    "training, device-hours": "cost/device_s/arms",
    "sampling, device-hours": "cost/device_s/samples",
    "evaluation, device-hours": "cost/device_s/metrics",
    "images trained on": "cost/images_trained",
}


@dataclass(frozen=True)
class Row:
    """One arm of one experiment, as tables and figures show it."""

    name: str
    colour: str
    arm: Mapping[str, Any]
    seeds: Sequence[TrackedSeed]


@dataclass(frozen=True)
class Group:
    """Experiments whose numbers may stand in one table.

    Attributes:
        protocol: what their numbers depend on besides arm and cell.
        differs: in what from the first group; None for the first.
        nfe: network evaluations by cell, those of an adaptive sampler as all counts that were found.
    """

    fingerprint: str
    protocol: Mapping[str, Any]
    differs: Difference | None
    experiments: Sequence[str]
    rows: Sequence[Row]
    metrics: Sequence[str]
    nfe: Mapping[str, int | str]
    primaries: Sequence[str]


def write_comparison(
    experiments: Sequence[TrackedExperiment], target: Path, *, one_table: bool = False
) -> dict[str, Any]:
    """Writes the page and returns what `--json` prints.

    Raises:
        ValueError: there is nothing to compare, the protocols are unequal although one table was asked for, or the
            target is another file than a page of this project.
    """
    if not experiments:
        raise ValueError("runs must be given to be compared, got none; name MLflow runs or experiments")
    _check_target(target)
    labels = _labels(experiments)
    rows = _rows(labels)
    groups, curves, nfe = _groups(labels, rows, one_table), _curves(rows), _nfe(rows)
    page = render(
        "comparison.html.jinja",
        experiments=labels,
        protocols={label: group.fingerprint for group in groups for label in group.experiments},
        groups=[{"group": group, "figure": data_uri(_figure(group))} for group in groups],
        not_compared=NOT_COMPARED,
        curves=data_uri(training_curves(curves, {row.name: row.colour for row in rows}))
        if any(curves.values())
        else None,
        grids=_grids(labels, groups),
        cost=_cost(rows),
        cost_titles=list(COST),
        total={label: _total(experiment) for label, experiment in labels.items()},
        nfe=nfe,
        nfe_cells=_by_evaluations({cell: n for counts in nfe.values() for cell, n in counts.items()}),
        settings=_differing({label: _settings(experiment) for label, experiment in labels.items()}),
        arm_settings=_differing({row.name: found for row in rows if (found := _arm_settings(row))}),
        runs={row.name: row.seeds for row in rows},
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page)
    return {
        "comparison": str(target.absolute()),
        "runs": [
            {"run_id": e.run_id, "experiment": e.name, "label": label, "url": e.url} for label, e in labels.items()
        ],
        "tables": [
            {"protocol": g.fingerprint, "runs": g.experiments, "cells": list(g.nfe), "metrics": g.metrics}
            for g in groups
        ],
    }


def _check_target(target: Path) -> None:
    """A page is made anew in its place; nothing else is overwritten."""
    if target.is_dir():
        raise ValueError(f"--output must be a file, got the directory {target}")
    if target.exists() and GENERATOR.encode() not in target.read_bytes()[:500]:
        raise ValueError(f"--output must be free or a page of mixflow, got {target}, another file; name another path")


def _labels(experiments: Sequence[TrackedExperiment]) -> dict[str, TrackedExperiment]:
    """Short names: the experiment's, with the beginning of the run's id where several share it."""
    names = [experiment.name for experiment in experiments]
    return {e.name if names.count(e.name) == 1 else f"{e.name} {e.run_id[:8]}": e for e in experiments}


def _rows(labels: Mapping[str, TrackedExperiment]) -> list[Row]:
    """Every arm of every experiment."""
    found, colours = [], cycle(COLOURS)
    for label, experiment in labels.items():
        for name, arm in experiment.summary["arms"].items():
            seeds = [seed for seed in experiment.seeds if seed.arm == name]
            found.append(Row(_row_name(label, name, labels), next(colours), arm, seeds))
    return found


def _row_name(label: str, arm: str, labels: Mapping[str, TrackedExperiment]) -> str:
    return arm if len(labels) == 1 else f"{label} / {arm}"


def _groups(labels: Mapping[str, TrackedExperiment], rows: Sequence[Row], one_table: bool) -> list[Group]:
    """The experiments by protocol, each with the first whose members it agrees with."""
    members: list[list[str]] = []
    protocols = {label: experiment.summary["protocol"] for label, experiment in labels.items()}
    for label in labels:
        for group in members:
            found = [(other, difference(protocols[other], protocols[label])) for other in group]
            unequal = next(((other, d) for other, d in found if d), None)
            if unequal is None:
                group.append(label)
                break
            if one_table:
                other, (key, first, second) = unequal
                raise ValueError(
                    f"--one-table must have runs of one protocol, got {key} {first!r} in {other} and {second!r} in "
                    f"{label}; leave --one-table out for a table of each"
                )
        else:
            members.append([label])
    first = protocols[members[0][0]]
    return [
        _group(group, labels, rows, None if group is members[0] else difference(first, protocols[group[0]]))
        for group in members
    ]


def _group(
    members: Sequence[str],
    labels: Mapping[str, TrackedExperiment],
    rows: Sequence[Row],
    differs: Difference | None,
) -> Group:
    summaries = [labels[label].summary for label in members]
    names = [_row_name(label, arm, labels) for label in members for arm in labels[label].summary["arms"]]
    counts: dict[str, list[int]] = {}
    for summary in summaries:
        for cell in _cells(summary):
            counts.setdefault(cell, []).append(summary["protocol"]["nfe"][cell])
    return Group(
        fingerprint=fingerprint(summaries[0]["protocol"]),
        protocol=summaries[0]["protocol"],
        differs=differs,
        experiments=members,
        rows=[row for row in rows if row.name in names],
        metrics=list(dict.fromkeys(metric for summary in summaries for metric in metrics_of(summary))),
        nfe={cell: n[0] if len(set(n)) == 1 else ", ".join(map(str, sorted(set(n)))) for cell, n in counts.items()},
        primaries=list(dict.fromkeys(summary["primary"] for summary in summaries)),
    )


def _cells(summary: Mapping[str, Any]) -> list[str]:
    """Every cell of a summary; those without guidance first, by their evaluations."""
    nfe = summary["protocol"]["nfe"]
    cells = list(dict.fromkeys(cell for arm in summary["arms"].values() for cell in arm["metrics"]))
    return sorted(cells, key=lambda cell: (not cell.endswith("/s1"), cell.rstrip("0123456789/s."), nfe[cell]))


def _figure(group: Group) -> bytes:
    nfe = {cell: count for cell, count in group.nfe.items() if isinstance(count, int)}
    colours = {row.name: row.colour for row in group.rows}
    return metric_curves({row.name: row.arm for row in group.rows}, group.metrics, nfe, colours)


def _curves(rows: Sequence[Row]) -> dict[str, dict[str, list[Sequence[tuple[int, float]]]]]:
    """Metric key -> row -> the curve of each seed."""
    return {
        key: {
            row.name: [seed.curves[key] for seed in row.seeds if key in seed.curves]
            for row in rows
            if any(key in seed.curves for seed in row.seeds)
        }
        for key in CURVES
    }


def _grids(labels: Mapping[str, TrackedExperiment], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Sheets of the primary cells, put together where they started from the same noise and labels.

    In one protocol the noise of an image depends on the experiment's seed and on the shape of what is sampled.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for group in groups:
        for label in group.experiments:
            experiment = labels[label]
            shape = "x".join(experiment.params.get(f"model.{key}", "?") for key in ("in_channels", "input_size"))
            cell, seed = experiment.summary["primary"].partition("/")[2], experiment.params.get("seed", "?")
            sheets = found.setdefault((cell, seed, shape, group.fingerprint), {})
            for arm, content in experiment.grids.items():
                sheets[_row_name(label, arm, labels)] = data_uri(content)
    return [
        {"cell": cell, "seed": seed, "shape": shape, "protocol": protocol, "images": images}
        for (cell, seed, shape, protocol), images in found.items()
        if images
    ]


def _cost(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Row -> what COST names, summed over its seeds; None where a seed does not say it."""
    return {row.name: [_sum(row.seeds, title, key) for title, key in COST.items()] for row in rows}


def _sum(seeds: Sequence[TrackedSeed], title: str, key: str) -> float | None:
    values = [seed.metrics.get(key) for seed in seeds]
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return None
    return sum(known) / (3600 if "hours" in title else 1)


def _total(experiment: TrackedExperiment) -> float | None:
    """Device-hours of all stages of an experiment, base and measuring included."""
    seconds = [value for key, value in experiment.metrics.items() if key.startswith("cost/device_s/")]
    return sum(seconds) / 3600 if seconds else None


def _nfe(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Row -> cell -> network evaluations of one image, as its first seed counted them."""
    prefix = "cost/nfe/"
    return {
        row.name: {key.removeprefix(prefix): n for key, n in row.seeds[0].metrics.items() if key.startswith(prefix)}
        for row in rows
        if row.seeds
    }


def _by_evaluations(nfe: Mapping[str, float]) -> list[str]:
    return sorted(nfe, key=lambda cell: (nfe[cell], cell))


def _settings(experiment: TrackedExperiment) -> dict[str, str]:
    """An experiment's settings but its name and its arms, which have a table of their own."""
    return {key: v for key, v in experiment.params.items() if key != "name" and not key.startswith("arms.")}


def _arm_settings(row: Row) -> dict[str, str]:
    """What an arm trained with; empty for one that did not train. The seed depends on the replicate."""
    params = row.seeds[0].params if row.seeds else {"post_training": "none"}
    if "post_training" in params:
        return {}
    return {key: value for key, value in params.items() if key not in ("arm", "replicate", "seed")}


def _differing(columns: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The columns' names, and each key that is not the same in all of them with its value in each."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    table = {key: [column.get(key) for column in columns.values()] for key in keys}
    return {"names": list(columns), "rows": {key: values for key, values in table.items() if len(set(values)) > 1}}
