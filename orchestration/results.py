"""From each replicate's metrics to paired differences and verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mixflow_core.statistics import paired_interval, student_interval
from orchestration.experiment import Experiment
from orchestration.workflow import PATHS_OF_CODEC, Workspace
from workers.evaluate import METRICS

# metric -> cell -> one value a replicate
Values = Mapping[str, Mapping[str, list[float]]]
LOWER_IS_BETTER = {"fd_digits": True, "kid_digits": True, "precision": False, "recall": False, "fd_pixels": True}

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


def read_metrics(workspace: Workspace) -> dict[str, Values]:
    """Every arm's metrics: arm -> metric -> cell -> values by replicate."""
    experiment = workspace.experiment
    found: dict[str, Values] = {}
    for arm in experiment.arms:
        rows = []
        for k in range(experiment.replicates):
            rows.append(json.loads(workspace.result(f"metrics/{arm}/{k}").read("metrics.json")))
        found[arm] = {metric: {cell: [row[cell][metric] for row in rows] for cell in rows[0]} for metric in METRICS}
    return found


def judge(arm: str, controls: list[str], values: Mapping[str, Values], primary: str, recall_margin: float) -> Verdict:
    """The rule, applied to one arm."""
    metric, _, cell = primary.partition("/")
    sign = 1 if LOWER_IS_BETTER[metric] else -1
    beats, loses, reasons = 0, False, []
    recall_falls = []
    for control in controls:
        d = paired_interval(values[arm][metric][cell], values[control][metric][cell])
        low, high = sorted((sign * d.low, sign * d.high))
        beats += high < 0
        loses = loses or low > 0
        word = "better than" if high < 0 else "worse than" if low > 0 else "not told apart from"
        fall = _mean(values[control]["recall"][cell]) - _mean(values[arm]["recall"][cell])
        if fall > recall_margin:
            recall_falls.append(control)
        reasons.append(f"{word} {control}: {format_interval(asdict(d), signed=True)}, recall {-fall:+.3f}")
    if loses:
        return Verdict("reject", tuple(reasons))
    if controls and beats == len(controls):
        return Verdict("reject" if recall_falls else "promote", tuple(reasons))
    return Verdict("inconclusive", tuple(reasons))


def summarise(workspace: Workspace) -> dict[str, Any]:
    """Everything the report shows, as plain JSON."""
    experiment = workspace.experiment
    values, evaluation = read_metrics(workspace), experiment.evaluation
    arms = {}
    for arm in experiment.arms:
        controls = experiment.controls_of(arm)
        verdict = judge(arm, controls, values, evaluation.primary, evaluation.recall_margin)
        arms[arm] = {
            "seeds": list(range(experiment.replicates)),
            "mixture": asdict(experiment.mixture_of(arm)) if experiment.arms[arm].train else None,
            "metrics": _each(values[arm], lambda m, c, v: {**asdict(student_interval(v)), "values": v}),
            "differences": {
                control: _each(values[arm], lambda m, c, v, o=control: asdict(paired_interval(v, values[o][m][c])))
                for control in controls
            },
            "verdict": asdict(verdict),
        }
    return {
        "experiment": experiment.name,
        "identity": experiment.identity,
        "primary": evaluation.primary,
        "rule": RULE.format(margin=evaluation.recall_margin),
        "arms": arms,
        "protocol": protocol(workspace),
    }


def protocol(workspace: Workspace) -> dict[str, Any]:
    """What a number depends on besides the arm; numbers of unequal protocols do not belong in one table."""
    experiment = workspace.experiment
    samples = workspace.result(f"samples/{next(iter(experiment.arms))}/0")
    data, features = workspace.result("data"), workspace.result("features")
    evaluation = experiment.evaluation
    codec = _decoder(experiment)
    return {
        "samplers": [asdict(s) for s in evaluation.samplers],
        "nfe": samples.manifest.meta["nfe"],
        "num_samples": evaluation.num_samples,
        "sample_batch_size": evaluation.sample_batch_size,
        "label_law": "equal (image i has class i mod number of classes)",
        "precision": "fp32",
        "rounding": "round((x + 1) 127.5) clamped to [0, 255]" if not codec else codec["rounding"],
        **({"codec": codec} if codec else {}),
        "reference": f"held-out split of data {data.manifest.digest[:16]}",
        "features": f"classifier {features.manifest.files['classifier.safetensors'].sha256[:16]}",
        "features_held_out_accuracy": features.manifest.meta["held_out_accuracy"],
        "replicates": experiment.replicates,
    }


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
    """`mean [low, high]` with the decimals that its size asks for."""
    size = abs(interval["mean"])
    decimals = 2 if size >= 10 else 3 if size >= 1 else 4
    mean, low, high = (f"{interval[key]:{'+' if signed else ''}.{decimals}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _each(values: Values, make: Any) -> dict[str, dict[str, Any]]:
    """Cell -> metric -> make(metric, cell, values)."""
    cells = next(iter(values.values()))
    return {cell: {metric: make(metric, cell, values[metric][cell]) for metric in values} for cell in cells}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
