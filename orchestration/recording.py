"""What MLflow is told of an experiment: a parent run, a child for each arm and seed, from what the workspace holds."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.launch import TRACKED_KINDS
from orchestration.protocols import fingerprint
from orchestration.results import format_interval
from orchestration.tracking import Metric
from orchestration.workflow import Artifact, Stage, Workspace, code_version

log = logging.getLogger(__name__)
DRAIN_S = 60.0
EXPERIMENT = ""  # the parent run; the others bear their stage's name
NOTE = "mlflow.note.content"  # what MLflow shows as a run's description
NOTE_ROWS = 40  # a tag has at most 8,000 characters


class Recorder:
    """Tells the Reporter what lies in the workspace, whoever computed it. Telling it again is harmless.

    Args:
        workspace: of the experiment.
        stages: that the run is about.
        reporter: the Reporter, as a Ray actor or an object of this process.
        is_actor: which of the two.
    """

    def __init__(self, workspace: Workspace, stages: list[Stage], reporter: Any, *, is_actor: bool) -> None:
        self.workspace, self.reporter, self.is_actor = workspace, reporter, is_actor
        self.trained = [stage for stage in stages if stage.kind in TRACKED_KINDS]

    def tell(self, method: str, *args: Any) -> Any:
        """Calls a method of the Reporter and waits for its answer (which never waits for MLflow, but for `drain`)."""
        call = getattr(self.reporter, method)
        if not self.is_actor:
            return call(*args)
        import ray

        return ray.get(call.remote(*args))

    def progress(self) -> Mapping[str, Any] | None:
        """What the workers told last; None while the actor is being restarted."""
        import ray

        try:
            found: Mapping[str, Any] = ray.get(self.reporter.progress.remote(), timeout=5)
            return found
        except (ray.exceptions.RayError, TimeoutError):
            return None

    def start(self) -> None:
        """Starts the parent run and a child for each training, or continues them."""
        experiment = self.workspace.experiment
        tags = {
            "mixflow.kind": "experiment",
            "mixflow.experiment": experiment.identity,
            "mixflow.workspace": self.workspace.storage.uri,
            "mixflow.code": code_version(),
        }
        # Experiments of one name and other settings stand side by side: their identity tells them apart.
        name = f"{experiment.name}-{experiment.identity[:6]}"
        params = experiment.model_dump(mode="json", exclude={"sweep"})  # which a run does not read, and may change
        self.tell("start_run", EXPERIMENT, name, params, tags)
        for stage in self.trained:
            arm, _, replicate = stage.name.removeprefix("arms/").partition("/")
            settings = stage.settings.get("run", stage.settings)
            self._start_child(stage.name, arm, replicate, settings, kind="base" if stage.kind == "base" else "arm")

    def training(self) -> None:
        """Histories, weights and cost of all trainings."""
        now = now_ms()
        for stage in self.trained:
            artifact = self.workspace.result(stage.name)
            if "history.jsonl" in artifact.manifest.files:
                rows = [json.loads(line) for line in artifact.read("history.jsonl").splitlines()]
                metrics = [Metric(k, row["step"], v, now) for row in rows for k, v in row.items() if k != "step"]
                self.tell("log", stage.name, metrics)
            images = {"cost/images_trained": _images_trained(stage)} if "run" in stage.settings else {}
            self._log(stage.name, {f"cost/device_s/{stage.kind}": artifact.device_s, **images})
            meta = artifact.manifest.meta
            tags = {
                "mixflow.weights": f"{artifact.full_uri}/weights.safetensors",
                "mixflow.weights_sha256": _weights_of(artifact),
                "mixflow.checkpoints": meta.get("checkpoints", "none: the weights were given"),
                "mixflow.code": meta["code"],
                **({"mixflow.device": meta["device"]} if "device" in meta else {}),
                **self._lineage(stage.inputs if stage.kind == "arms" else (stage.name,)),
            }
            self.tell("tags", stage.name, tags)
        self.tell("tags", EXPERIMENT, self._lineage())

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        """Metrics, sample grids and cost of every arm and seed; protocol, verdicts and total cost on the parent run."""
        experiment = self.workspace.experiment
        protocol = {"mixflow.protocol": fingerprint(summary["protocol"])}
        for name, arm in summary["arms"].items():
            trained = experiment.arms[name].train
            for k in arm["seeds"]:
                run = f"arms/{name}/{k}"
                if not trained:  # the base under sampling seed k has no training run of its own
                    self._start_child(run, name, str(k), {"post_training": "none"}, kind="arm")
                values = {
                    f"eval/{metric}/{cell}": interval["values"][k]
                    for cell, metrics in arm["metrics"].items()
                    for metric, interval in metrics.items()
                    if k < len(interval["values"])  # a cell of the first base alone has no more
                }
                self._log(run, values)
                samples, metrics = (self.workspace.result(f"{kind}/{name}/{k}") for kind in ("samples", "metrics"))
                self._log(run, _sampling_cost(samples, metrics))
                grids = [f"{samples.path}/{file}" for file in samples.manifest.files if file.endswith(".png")]
                self.tell("artifacts", run, grids, "")  # MLflow's page of compared runs shows no folders
                verdict = {"mixflow.verdict": arm["verdict"]["verdict"]}
                base = experiment.base_stage(experiment.base_of(k))
                tags = {"mixflow.samples": samples.full_uri, **protocol, **verdict, **self._lineage((base,))}
                self.tell("tags", run, tags)
                if not trained:
                    self.tell("end_run", run, "FINISHED")
        metric, _, cell = experiment.evaluation.primary.partition("/")
        means = {f"primary/{name}": arm["metrics"][cell][metric]["mean"] for name, arm in summary["arms"].items()}
        self._log(EXPERIMENT, {**means, **self._total_cost()})
        verdicts = {f"mixflow.verdict.{name}": arm["verdict"]["verdict"] for name, arm in summary["arms"].items()}
        self.tell("tags", EXPERIMENT, {**verdicts, **protocol, NOTE: note(summary)})
        path = f"{self.workspace.home}/protocol.json"
        self.workspace.storage.put(path, json.dumps(summary["protocol"], indent=1).encode())
        self.artifacts([path])

    def artifacts(self, paths: list[str]) -> None:
        """Copies objects of the workspace to the parent run."""
        self.tell("artifacts", EXPERIMENT, paths, "")

    def end(self, status: str) -> None:
        """Ends every run."""
        for name in [*(stage.name for stage in self.trained), EXPERIMENT]:
            self.tell("end_run", name, status)

    def end_badly(self, status: str) -> None:
        """Ends every run after a failure, as far as the cluster answers: the failure is what the user must see."""
        try:
            self.end(status)
            self.tell("drain", 5.0)
        except Exception as error:
            log.warning("MLflow was not told that the run %s: %s", status.lower(), error)

    def delivered(self) -> Mapping[str, Any]:
        """Waits while MLflow takes what there is; the tracker's status, and `run_id` of the parent run."""
        status: Mapping[str, Any] = self.tell("drain", DRAIN_S)
        return status

    def _start_child(self, run: str, arm: str, replicate: str, settings: Mapping[str, Any], *, kind: str) -> None:
        """A run below the parent, called `<arm>/<replicate>`: short, because MLflow's charts show names."""
        tags = {"mixflow.kind": kind, "mixflow.arm": arm, "mixflow.replicate": replicate or "0"}
        params = {"arm": arm, "replicate": replicate or "0", **settings}
        name = f"{arm}/{replicate}" if replicate else arm
        self.tell("start_run", run, name, params, tags, EXPERIMENT)

    def _log(self, run: str, values: Mapping[str, float]) -> None:
        """Values that a run has once: at step 0, where MLflow draws bars, one a run, instead of curves of one point."""
        self.tell("log", run, [Metric(key, 0, value, now_ms()) for key, value in values.items()])

    def _lineage(self, stages: Sequence[str] = ()) -> dict[str, str]:
        """The data that every run goes back to, and the base among the stages named, or the only one."""
        experiment = self.workspace.experiment
        only = [experiment.base_stage()] if experiment.bases == 1 else []
        names = [name for name in stages or only if name.startswith("base")]
        base, data = self.workspace.artifact(names[0]) if names else None, self.workspace.artifact("data")
        found = {"mixflow.base_sha256": _weights_of(base)} if base else {}
        return {**found, "mixflow.data": data.manifest.digest} if data else found

    def _total_cost(self) -> dict[str, float]:
        """Cost of all stages there are, whoever computed them; what equal arms share is counted once."""
        cost = {"cost/images_trained": 0.0}
        stages = [stage for stage in self.workspace.stages.values() if stage.kind != "report"]
        artifacts = {stage.name: self.workspace.artifact(stage.name) for stage in stages}
        done = {artifact.full_uri: (stage, artifact) for stage in stages if (artifact := artifacts[stage.name])}
        for stage, artifact in done.values():
            key = f"cost/device_s/{stage.kind}"
            cost[key] = cost.get(key, 0.0) + artifact.device_s
            if "run" in stage.settings and stage.kind in TRACKED_KINDS:
                cost["cost/images_trained"] += _images_trained(stage)
        return cost


def note(summary: Mapping[str, Any]) -> str:
    """The verdicts as Markdown, for MLflow's page of the run."""
    metric, _, cell = summary["primary"].partition("/")
    lines = [f"| arm | {metric} at {cell}, mean [95 %] | verdict |", "|---|---|---|"]
    for name, arm in list(summary["arms"].items())[:NOTE_ROWS]:
        lines.append(f"| {name} | {format_interval(arm['metrics'][cell][metric])} | {arm['verdict']['verdict']} |")
    left = len(summary["arms"]) - NOTE_ROWS
    more = f" It has {left} more arms." if left > 0 else ""
    return "\n".join([*lines, "", f"`report.html` among the artifacts says why and shows the rest.{more}"])


def _sampling_cost(samples: Artifact, metrics: Artifact) -> dict[str, float]:
    """Of one arm and seed: device-seconds, and network evaluations of one image in each cell."""
    nfe = {f"cost/nfe/{cell}": float(count) for cell, count in samples.manifest.meta["nfe"].items()}
    return {"cost/device_s/samples": samples.device_s, "cost/device_s/metrics": metrics.device_s, **nfe}


def _images_trained(stage: Stage) -> float:
    training = stage.settings["run"]["training"]
    return float(training["steps"] * training["global_batch_size"])


def _weights_of(artifact: Artifact) -> str:
    return artifact.manifest.files["weights.safetensors"].sha256


def now_ms() -> int:
    """Unix time in ms."""
    return int(time.time() * 1000)
