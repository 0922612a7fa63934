"""From each replicate's metrics to paired differences and verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixflow_core.statistics import student_interval
from orchestration.comparison import difference, recall_beside
from orchestration.experiment import Experiment
from orchestration.workflow import PATHS_OF_CODEC, Workspace
from workers.manifest import canonical_hash

# One metrics.json: cell -> metric -> value, and beside the metrics, where they were measured,
# within: metric -> sd over resamples of the images, and by_count: metric -> number of images -> value.
Replicate = Mapping[str, Mapping[str, Any]]
BESIDE = ("within", "by_count")
# metric -> cell -> one value a replicate
Values = Mapping[str, Mapping[str, list[float]]]

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
    return {arm: _values(replicates) for arm, replicates in read_replicates(workspace).items()}


def read_replicates(workspace: Workspace) -> dict[str, list[Replicate]]:
    """Every arm's metrics.json by replicate.

    Raises:
        ValueError: two of them hold other metrics, as after a change of the code.
    """
    experiment = workspace.experiment
    found: dict[str, list[Replicate]] = {}
    for arm in experiment.arms:
        artifacts = [workspace.result(f"metrics/{arm}/{k}") for k in range(experiment.replicates)]
        found[arm] = [json.loads(artifact.read("metrics.json")) for artifact in artifacts]
    _check_alike(found)
    return found


def judge(arm: str, controls: list[str], values: Mapping[str, Values], primary: str, recall_margin: float) -> Verdict:
    """The rule, applied to one arm.

    Raises:
        ValueError: the primary metric, or a recall beside it, was not measured.
    """
    metric, _, cell = primary.partition("/")
    recall = recall_beside(metric, values[arm])
    calls, reasons, recall_falls = [], [], False
    words = {"better": "better than", "worse": "worse than", "inconclusive": "not told apart from"}
    for control in controls:
        d = difference(metric, [values[arm][metric][cell]], [values[control][metric][cell]])
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
    effect = getattr(evaluation, "effect", None)
    arms = {}
    for arm in experiment.arms:
        controls = experiment.controls_of(arm)
        verdict = judge(arm, controls, values, evaluation.primary, evaluation.recall_margin)
        arms[arm] = {
            "seeds": list(range(experiment.replicates)),
            "mixture": asdict(experiment.mixture_of(arm)) if experiment.arms[arm].train else None,
            "metrics": _each(
                values[arm],
                lambda m, c, v, r=replicates[arm]: {
                    **asdict(student_interval(v)),
                    "values": v,
                    "within_sd": _within_sd(r, c, m),
                },
            ),
            "by_count": _each(values[arm], lambda m, c, v, r=replicates[arm]: _by_count(r, c, m)),
            "differences": {
                control: _each(
                    values[arm], lambda m, c, v, o=values[control]: difference(m, [v], [o[m][c]], effect=effect)
                )
                for control in controls
            },
            "verdict": asdict(verdict),
        }
    return {
        "experiment": experiment.name,
        "identity": experiment.identity,
        "primary": evaluation.primary,
        "effect": effect,
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


def fingerprint(protocol: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that are equal where the protocols are, the number of replicates aside."""
    return canonical_hash(_compared(protocol))[:12]


def check_protocols(protocols: Sequence[Mapping[str, Any]]) -> None:
    """Numbers of these protocols may stand in one table.

    Raises:
        ValueError: two differ, in more than the number of replicates.
    """
    first, *others = [_compared(protocol) for protocol in protocols] or [{}]
    for other in others:
        for key in {**first, **other}:
            if key not in first or key not in other or first[key] != other[key]:
                a, b = (json.dumps(p[key]) if key in p else "nothing" for p in (first, other))
                raise ValueError(
                    f"protocol.{key} must be the same in one table, got {a} and {b}; evaluate alike or show two tables"
                )


def _compared(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: a protocol that was read from a file equals the one that was written."""
    found: dict[str, Any] = json.loads(json.dumps({k: v for k, v in protocol.items() if k != "replicates"}))
    return found


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


def _check_alike(found: Mapping[str, Sequence[Replicate]]) -> None:
    held = {
        f"metrics/{arm}/{k}": {cell: sorted(set(metrics) - set(BESIDE)) for cell, metrics in replicate.items()}
        for arm, replicates in found.items()
        for k, replicate in enumerate(replicates)
    }
    (first, expected), *others = held.items()
    for name, cells in others:
        for cell in {**expected, **cells}:
            if cells.get(cell) != expected.get(cell):
                raise ValueError(
                    f"{name} must hold the metrics of {first} in {cell}, {expected.get(cell)}, got {cells.get(cell)}; "
                    "redo the older one with --force"
                )


def _values(replicates: Sequence[Replicate]) -> Values:
    found: dict[str, dict[str, list[float]]] = {}
    for cell, metrics in replicates[0].items():
        for metric in metrics:
            if metric not in BESIDE:
                found.setdefault(metric, {})[cell] = [replicate[cell][metric] for replicate in replicates]
    return found


def _within_sd(replicates: Sequence[Replicate], cell: str, metric: str) -> float | None:
    """Mean over the replicates, None unless all of them have it."""
    found = [replicate[cell].get("within", {}).get(metric) for replicate in replicates]
    return None if None in found else _mean(found)


def _by_count(replicates: Sequence[Replicate], cell: str, metric: str) -> list[list[float]]:
    """[number of images, mean over the replicates] of each number that all of them have, rising."""
    found = [replicate[cell].get("by_count", {}).get(metric, {}) for replicate in replicates]
    counts = sorted(set(found[0]).intersection(*found), key=int)
    return [[int(count), _mean([values[count] for values in found])] for count in counts]


def _each(values: Values, make: Any) -> dict[str, dict[str, Any]]:
    """Cell -> metric -> make(metric, cell, values)."""
    found: dict[str, dict[str, Any]] = {}
    for metric, cells in values.items():
        for cell, by_replicate in cells.items():
            found.setdefault(cell, {})[metric] = make(metric, cell, by_replicate)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
