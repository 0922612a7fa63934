"""The trials of a sweep as experiments of their own, and what is checked before the first of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mixflow_core.ema import warm_decay
from orchestration.experiment import SEARCH_PAIR, Experiment
from orchestration.recipe import put, validated
from orchestration.sections import Sweep
from orchestration.space import samples_of
from workers.manifest import canonical_hash

STANDARD, MATCHED = CONTROLS = ("standard", "matched")
SCHEDULING = {"space", "search", "scheduler", "num_trials", "grace_steps", "reduction_factor"}
# Of an experiment, what its trials do not read.
UNREAD = {"cluster", "arms", "replicates", "claims"}


def label_of(number: int) -> str:
    """Name of trial `number`."""
    return f"t{number:03d}"


def trial_experiment(experiment: Experiment, label: str, params: Mapping[str, Any]) -> Experiment:
    """The experiment with a trial's parameters, whose arms are standard training and the trial.

    Args:
        experiment: with a sweep section.
        label: `standard`, `matched`, or `t<number>`.
        params: dotted keys, set as `--set` does; `mixture.slowing_law=independent` alone sets gamma to 0 with it.

    Raises:
        ValueError: one line that names the parameters, what is wrong and the mend.
    """
    raw = json.loads(experiment.model_dump_json())
    raw["claims"] = []
    raw["arms"] = {STANDARD: {"mixture": asdict(experiment.standard)}}
    if label != STANDARD:
        raw["arms"][label] = {"judged": False, "mixture": {"condition_on": "m"} if label == MATCHED else {}}
    put_params(raw, params, label)
    at = ", ".join(f"{key}={value}" for key, value in params.items())
    return validated(f"{experiment.name} with {at}" if at else experiment.name, raw)


def put_params(raw: dict[str, Any], params: Mapping[str, Any], *arms: str) -> None:
    """Sets a trial's parameters in raw settings, those of `corrective` in the arms."""
    if params.get("mixture.slowing_law") == "independent" and "mixture.gamma" not in params:
        put(raw, "mixture.gamma", 0)  # that law has no range: without this it could not be searched beside the other
    for key, value in params.items():
        for place in (f"arms.{arm}.{key}" for arm in arms) if key.startswith("corrective.") else (key,):
            put(raw, place, value)


def check_space(experiment: Experiment) -> list[Experiment]:
    """The experiments at the corners of the space and at points within it, all valid; at least one.

    Raises:
        ValueError: the sweep has no space, a key does not exist, one of the points is no valid run, or the scheduler
            could never stop a trial.
    """
    sweep = sweep_of(experiment)
    laws = sweep.laws
    if not laws:
        raise ValueError("sweep.space must have a key, got none; add --space 'mixture.gamma=uniform(0.2,1.0)'")
    for control in CONTROLS:
        trial_experiment(experiment, control, {})
    found = [trial_experiment(experiment, label_of(n), point) for n, point in enumerate(samples_of(laws))]
    for one in found if "training.ema_decay" in laws else ():
        if one.training.ema_decay > (most := warm_decay(1.0, one.training.steps)):
            raise ValueError(
                f"sweep.space must keep training.ema_decay at most {most:.4g}, which is where its warm-up is after "
                f"{one.training.steps} steps: above, trials are the same, got {one.training.ema_decay}; lower it"
            )
    steps = max(one.training.steps for one in found)
    if sweep.scheduler == "asha" and (grace := grace_of(experiment)) >= steps:
        raise ValueError(
            f"sweep.grace_steps must lie below training.steps {steps} for asha, or it stops nothing, got {grace}; "
            "lower it, or sweep.evaluate_every, which it is if not given"
        )
    return found


def grace_of(experiment: Experiment) -> int:
    """Steps that ASHA stops no trial before."""
    sweep = sweep_of(experiment)
    return sweep.grace_steps or sweep.evaluate_every or experiment.training.checkpoint_every


def sweep_of(experiment: Experiment) -> Sweep:
    """The sweep section, or its defaults."""
    return experiment.sweep or Sweep()


def sweep_identity(experiment: Experiment) -> str:
    """Hash of what all trials share: a sweep with a wider space, more trials or another search is the same sweep."""
    shared = experiment.model_dump(mode="json", exclude=UNREAD | {"sweep"})
    shared["pair"] = SEARCH_PAIR
    return canonical_hash({**shared, "sweep": sweep_of(experiment).model_dump(mode="json", exclude=SCHEDULING)})[:12]
