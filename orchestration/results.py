"""From each replicate's metrics to paired differences and verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixflow_core.statistics import seed_variance
from orchestration.differences import agreement, difference, recall_beside, spread
from orchestration.experiment import Experiment
from orchestration.protocols import fingerprint, is_adaptive
from orchestration.sections import Claim
from orchestration.workflow import PATHS_OF_CODEC, Workspace
from workers.evaluate import BATCH, ESTIMATORS
from workers.sample import LABEL_LAWS

# One metrics.json: cell -> metric -> value, and beside the metrics, where they were measured,
# within: metric -> sd over resamples of the images, by_count: metric -> number of images -> value, and step: metric ->
# what it moves in, where it is a share of images.
Replicate = Mapping[str, Mapping[str, Any]]
BESIDE = ("within", "by_count", "step")
# metric -> cell -> one value a replicate
Values = Mapping[str, Mapping[str, list[float]]]

SMALL = 0.01  # below it four decimals say little

RULE = (
    "An arm is promoted when, on the primary cell, the 95 % Student interval of its paired difference lies on the "
    "better side of zero against every one of its controls and its mean recall falls by no more than {margin:g} below "
    "any of theirs. It is rejected when an interval lies on the worse side of zero, or when it would be promoted but "
    "for recall. Anything else is inconclusive."
)


@dataclass(frozen=True)
class Verdict:
    """promote, reject or inconclusive, and why in a sentence for each control."""

    verdict: str
    reasons: tuple[str, ...]


def read_replicates(workspace: Workspace) -> dict[str, list[Replicate]]:
    """Every arm's metrics.json by replicate.

    Raises:
        ValueError: two of them hold other metrics, as after a change of the code.
    """
    experiment = workspace.experiment
    found: dict[str, list[Replicate]] = {}
    for arm in experiment.arms:
        artifacts = [workspace.result(f"metrics/{arm}/{pair}") for pair in range(experiment.num_pairs)]
        found[arm] = [json.loads(artifact.read("metrics.json")) for artifact in artifacts]
    _check_alike(found)
    return found


def judge(
    arm: str,
    controls: list[str],
    values: Mapping[str, Values],
    primary: str,
    recall_margin: float,
    seeds: int | None = None,
    steps: Mapping[str, float] | None = None,
) -> Verdict:
    """The rule, applied to one arm; `seeds` a base, None where there is one base; `steps` of metrics as in difference.

    Raises:
        ValueError: the primary metric, or a recall beside it, was not measured.
    """
    metric, _, cell = primary.partition("/")
    recall = recall_beside(metric, values[arm])
    calls, reasons, recall_falls = [], [], False
    words = {"better": "better than", "worse": "worse than", "inconclusive": "not told apart from"}
    for control in controls:
        both = (by_base(values[name][metric][cell], seeds) for name in (arm, control))
        d = difference(metric, *both, step=(steps or {}).get(metric, 0))
        calls.append(d["call"])
        change = _mean(values[arm][recall][cell]) - _mean(values[control][recall][cell])
        recall_falls = recall_falls or -change > recall_margin
        reasons.append(f"{words[d['call']]} {control}: {format_interval(d, signed=True)}, {recall} {change:+.3f}")
    if "worse" in calls:
        return Verdict("reject", tuple(reasons))
    if controls and "inconclusive" not in calls:
        return Verdict("reject" if recall_falls else "promote", tuple(reasons))
    return Verdict("inconclusive", tuple(reasons))


def summarise(workspace: Workspace) -> dict[str, Any]:
    """Everything the report shows, as plain JSON."""
    experiment, evaluation = workspace.experiment, workspace.experiment.evaluation
    replicates = read_replicates(workspace)
    values = {arm: _values(found) for arm, found in replicates.items()}
    effect, seeds, steps = evaluation.effect, experiment.replicates, _steps(replicates)
    arms = {}
    for arm in experiment.arms:
        controls = experiment.controls_of(arm)
        verdict = Verdict("not judged", ())
        if experiment.arms[arm].judged:
            verdict = judge(arm, controls, values, evaluation.primary, evaluation.recall_margin, seeds, steps)
        arms[arm] = {
            "seeds": list(range(experiment.num_pairs)),
            "corrective": _changed(experiment.arms[arm].corrective),
            "sampling": _changed(experiment.arms[arm].sampling),
            "mixture": asdict(experiment.mixture_of(arm)) if experiment.arms[arm].train else None,
            "metrics": _each(
                values[arm],
                lambda m, c, v, r=replicates[arm]: {
                    **spread(by_base(v, seeds), steps.get(m, 0)),
                    "values": v,
                    "seeds_sd": _seeds_sd(by_base(v, seeds)),
                    "within_sd": _within_sd(r, c, m),
                },
            ),
            "by_count": _each(values[arm], lambda m, c, v, r=replicates[arm]: _by_count(r, c, m)),
            "differences": {
                control: _each(
                    values[arm],
                    lambda m, c, v, o=values[control], mine=replicates[arm], its=replicates[control]: {
                        **difference(
                            m, by_base(v, seeds), by_base(o[m][c], seeds), effect=effect, step=steps.get(m, 0)
                        ),
                        "by_count": _difference_by_count(mine, its, c, m, seeds),
                    },
                )
                for control in controls
            },
            "verdict": asdict(verdict),
        }
    about = protocol(workspace)
    return {
        "experiment": experiment.name,
        "identity": experiment.identity,
        "primary": evaluation.primary,
        "effect": effect,
        "rule": RULE.format(margin=evaluation.recall_margin),
        "bases": experiment.bases,
        "arms": arms,
        "claims": [_claim(claim, values, evaluation.primary, effect, seeds, steps) for claim in experiment.claims],
        "protocol": about,
        "fingerprint": fingerprint(about),
    }


def by_base(values: Sequence[float], seeds: int | None) -> list[list[float]]:
    """Values by pair as values by base and seed; the last bases may be missing."""
    seeds = seeds or len(values)
    return [list(values[start : start + seeds]) for start in range(0, len(values), seeds)]


def _claim(
    claim: Claim, values: Mapping[str, Values], primary: str, effect: float, seeds: int, steps: Mapping[str, float]
) -> dict[str, Any]:
    """A publication's claim beside what every cell says in the primary metric."""
    metric = primary.partition("/")[0]
    cells = {}
    for cell, of_arm in values[claim.arm][metric].items():
        of_control = values[claim.control][metric][cell]
        found = difference(metric, by_base(of_arm, seeds), by_base(of_control, seeds), step=steps.get(metric, 0))
        cells[cell] = {**found, "agreement": agreement(claim.expected, found, effect * abs(_mean(of_control)))}
    return {**claim.model_dump(mode="json"), "metric": metric, "cells": cells}


def _changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from its defaults."""
    return {name: value for name, value in asdict(settings).items() if value != getattr(type(settings)(), name)}


def protocol(workspace: Workspace) -> dict[str, Any]:
    """What a number depends on besides the arm; numbers of unequal protocols do not belong in one table."""
    experiment = workspace.experiment
    features, evaluation, codec = workspace.result("features"), experiment.evaluation, _decoder(experiment)
    extractors = {extractor.kind: extractor.sha256[:16] for extractor in evaluation.extractors}
    if "digits" in extractors:
        extractors["digits"] = features.manifest.files["classifier.safetensors"].sha256[:16]
    return {
        "samplers": [asdict(s) for s in evaluation.samplers],
        "nfe": _evaluations(workspace),
        "num_samples": evaluation.num_samples,
        "sample_batch_size": evaluation.sample_batch_size,
        "label_law": LABEL_LAWS[evaluation.label_law],
        "precision": "fp32",
        "rounding": "round((x + 1) 127.5) clamped to [0, 255]" if not codec else codec["rounding"],
        **({"codec": codec} if codec else {}),
        "reference": _reference(workspace),
        "extractors": extractors,
        **({"guide": experiment.guide.sha256[:16]} if experiment.guide and experiment.is_autoguided else {}),
        "extractor_batch_size": BATCH,
        "estimators": ESTIMATORS,
        **({"classifier_accuracy": features.manifest.meta["held_out_accuracy"]} if "digits" in extractors else {}),
        "bases": experiment.bases,
        "replicates": experiment.replicates,
    }


def _evaluations(workspace: Workspace) -> dict[str, int]:
    """Network evaluations of an image by cell; those of an adaptive sampler, an outcome, as the mean over arms."""
    arms = [workspace.result(f"samples/{arm}/0").manifest.meta["nfe"] for arm in workspace.experiment.arms]
    return {
        cell: round(_mean([nfe[cell] for nfe in arms])) if is_adaptive(cell) else count
        for cell, count in arms[0].items()
    }


def _reference(workspace: Workspace) -> str:
    source = workspace.experiment.evaluation.reference
    if source.npz:
        return f"statistics of the file {(source.sha256 or '')[:16]}"
    return f"{source.split} split of data {workspace.result('data').manifest.digest[:16]}"


def _decoder(experiment: Experiment) -> dict[str, Any]:
    """The codec that made pixels of the samples, without the paths of its files; empty for a model of pixels."""
    codec = experiment.codec
    if codec is None or codec.kind == "identity":
        return {}
    return {name: value for name, value in asdict(codec).items() if value and name not in PATHS_OF_CODEC}


def cell_file(cell: str) -> str:
    """File name of a cell: euler8/s1.5 -> euler8-s1.5."""
    return cell.replace("/", "-")


def format_interval(interval: Mapping[str, Any], *, signed: bool = False) -> str:
    """`mean [low, high]` with the decimals that its size asks for; of a single pair `mean (n = 1)`."""
    size = abs(interval["mean"])
    if size < SMALL and interval["low"] is not None:
        size = max(abs(interval[key]) for key in ("mean", "low", "high"))
    decimals = decimals_of(size)
    if interval["low"] is None:
        return f"{interval['mean']:{'+' if signed else ''}.{decimals}f} (n = 1)"
    mean, low, high = (f"{interval[key]:{'+' if signed else ''}.{decimals}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def decimals_of(size: float) -> int:
    """Decimals that show a number of this size to three digits or more; at least 4 below 1, and 12 at most."""
    if size >= SMALL or size == 0:
        return 2 if size >= 10 else 3 if size >= 1 else 4
    return min(12, 2 - math.floor(math.log10(size)))


def _check_alike(found: Mapping[str, Sequence[Replicate]]) -> None:
    held = {
        f"metrics/{arm}/{k}": {cell: sorted(set(metrics) - set(BESIDE)) for cell, metrics in replicate.items()}
        for arm, replicates in found.items()
        for k, replicate in enumerate(replicates)
    }
    (first, expected), *others = held.items()
    for name, cells in others:
        for cell, metrics in cells.items():  # a cell of the first base alone is missing in the others
            if metrics != expected.get(cell):
                raise ValueError(
                    f"{name} must hold the metrics of {first} in {cell}, {expected.get(cell)}, got {metrics}; "
                    "redo the older one with --force"
                )


def _values(replicates: Sequence[Replicate]) -> Values:
    found: dict[str, dict[str, list[float]]] = {}
    for cell, metrics in replicates[0].items():
        for metric in metrics:
            if metric not in BESIDE:
                found.setdefault(metric, {})[cell] = [r[cell][metric] for r in replicates if cell in r]
    return found


def _seeds_sd(values: Sequence[Sequence[float]]) -> float | None:
    """Between the seeds of a base, where there are several bases: without them that is the interval's own sd."""
    if len(values) == 1 or max(map(len, values)) == 1:
        return None
    return math.sqrt(seed_variance(values))


def _within_sd(replicates: Sequence[Replicate], cell: str, metric: str) -> float | None:
    """Mean over the replicates, None unless all of them have it."""
    found = [replicate[cell].get("within", {}).get(metric) for replicate in replicates if cell in replicate]
    return None if None in found else _mean(found)


def _by_count(replicates: Sequence[Replicate], cell: str, metric: str) -> list[list[float]]:
    """[number of images, mean, lowest and highest of the replicates] of each number that all have, rising."""
    found = [replicate[cell].get("by_count", {}).get(metric, {}) for replicate in replicates if cell in replicate]
    counts = sorted(set(found[0]).intersection(*found), key=int)
    columns = {count: [values[count] for values in found] for count in counts}
    return [[int(count), _mean(seen), min(seen), max(seen)] for count, seen in columns.items()]


def _difference_by_count(
    arm: Sequence[Replicate], control: Sequence[Replicate], cell: str, metric: str, seeds: int
) -> list[dict[str, Any]]:
    """The paired difference with fewer images, by rising `count`; numbers that not all replicates have are left out."""
    found = [
        (mine[cell].get("by_count", {}).get(metric, {}), its[cell].get("by_count", {}).get(metric, {}))
        for mine, its in zip(arm, control, strict=True)
        if cell in mine
    ]
    counts = set.intersection(*(set(one) for both in found for one in both))
    return [
        {"count": int(n), **spread(by_base([mine[n] - its[n] for mine, its in found], seeds))}
        for n in sorted(counts, key=int)
    ]


def _steps(replicates: Mapping[str, Sequence[Replicate]]) -> dict[str, float]:
    """What metrics move in, which is the same in all cells; without those that are no share of images."""
    found: dict[str, float] = {}
    for cell in next(iter(replicates.values()))[0].values():
        found.update(cell.get("step", {}))
    return found


def _each(values: Values, make: Any) -> dict[str, dict[str, Any]]:
    """Cell -> metric -> make(metric, cell, values)."""
    found: dict[str, dict[str, Any]] = {}
    for metric, cells in values.items():
        for cell, by_replicate in cells.items():
            found.setdefault(cell, {})[metric] = make(metric, cell, by_replicate)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
