"""The best of a sweep, compared again with its controls: with replicates, as an experiment of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from orchestration.experiment import Experiment
from orchestration.launch import Reporter, RunFailedError
from orchestration.protocols import fingerprint
from orchestration.recipe import validated
from orchestration.recording import DRAIN_S
from orchestration.results import format_interval, summarise
from orchestration.run import Place, run_experiment
from orchestration.trials import MATCHED, STANDARD, put_params
from orchestration.workflow import Workspace

BEST = "best"


def best_experiment(experiment: Experiment, params: Mapping[str, Any]) -> Experiment:
    """`<name>-best`: the best parameters beside standard training and, where they slow, their own matched marginal.

    It is judged where the sweep was, and its seeds are none that the sweep has seen: what was the luckiest there is not
    counted again.
    """
    raw = json.loads(experiment.model_dump_json())
    raw |= {"name": f"{experiment.name}-{BEST}", "claims": [], "sweep": None}
    raw["evaluation"]["primary"] = experiment.objective
    raw["arms"] = {
        STANDARD: {"mixture": asdict(experiment.standard)},
        BEST: {},
        MATCHED: {"mixture": {"condition_on": "m"}},
    }
    put_params(raw, params, BEST, MATCHED)
    found = validated(raw["name"], raw)
    if found.mixture_of(BEST) == found.mixture_of(MATCHED):
        del raw["arms"][MATCHED]
        found = validated(raw["name"], raw)
    return found


def write_best(experiment: Experiment, answer: Mapping[str, Any], place: Place) -> str:
    """Writes the best as an experiment file beside the sweep's results; returns its URI."""
    settings = json.loads(best_experiment(experiment, answer["best"]["params"]).model_dump_json())
    path = f"{answer['sweep']}/best.yaml"
    place.storage.put(path, yaml.safe_dump(settings, sort_keys=False).encode())
    return f"{place.storage.uri}/{path}"


def confirm(experiment: Experiment, answer: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Runs the best of a sweep as an experiment and registers its first weights in MLflow's model registry.

    Raises:
        RunFailedError: no trial has finished.
    """
    if answer["best"] is None:
        raise RunFailedError("--confirm needs a trial that has finished, got none; see the reasons in the table")
    again = best_experiment(experiment, answer["best"]["params"])
    outcome = run_experiment(again, place)
    workspace = Workspace(again, place.storage)
    summary = summarise(workspace)
    weights, base, data = (workspace.result(name) for name in (f"arms/{BEST}/0", again.base_stage(), "data"))
    metric, _, cell = again.evaluation.primary.partition("/")
    arm = summary["arms"][BEST]
    tags = {
        "mixflow.protocol": fingerprint(summary["protocol"]),
        "mixflow.verdict": arm["verdict"]["verdict"],
        "mixflow.weights_sha256": weights.manifest.files["weights.safetensors"].sha256,
        "mixflow.base_sha256": base.manifest.files["weights.safetensors"].sha256,
        "mixflow.data": data.manifest.digest,
        "mixflow.sweep": answer["sweep"],
        "mixflow.trial": answer["best"]["label"],
        f"mixflow.{again.evaluation.primary}": format_interval(arm["metrics"][cell][metric]),
        **{f"mixflow.params.{key}": str(value) for key, value in answer["best"]["params"].items()},
    }
    reporter = Reporter(place.storage.uri, place.tracking_uri, again.name, workspace.home)
    try:
        reporter.register(f"arms/{BEST}/0", again.name, weights.full_uri, BEST, tags)
        status = reporter.drain(DRAIN_S)
    finally:
        reporter.tracker.close()
    return {**outcome, "model": again.name, "alias": BEST, "pending": status["pending"]}
