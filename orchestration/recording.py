"""What MLflow is told of an experiment: a parent run, a child for each arm and seed, from what the workspace holds."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from orchestration.launch import TRACKED_KINDS
from orchestration.tracking import Metric
from orchestration.workflow import Stage, Workspace

log = logging.getLogger(__name__)
DRAIN_S = 60.0
EXPERIMENT = ""  # the parent run; the others bear their stage's name


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
        tags = {"mixflow.experiment": experiment.identity, "mixflow.workspace": self.workspace.storage.uri}
        self.tell("start_run", EXPERIMENT, experiment.name, experiment.model_dump(mode="json"), tags)
        for stage in self.trained:
            _, arm, replicate = f"{stage.name}//".split("/")[:3]
            tags = {"mixflow.arm": arm or "base", "mixflow.replicate": replicate or "0"}
            name = stage.name.removeprefix("arms/")
            self.tell("start_run", stage.name, name, stage.settings, tags, EXPERIMENT)

    def training(self) -> None:
        """Histories and weights of all trainings."""
        now = _now_ms()
        for stage in self.trained:
            artifact = self.workspace.result(stage.name)
            if "history.jsonl" in artifact.manifest.files:
                rows = [json.loads(line) for line in artifact.read("history.jsonl").splitlines()]
                metrics = [Metric(k, row["step"], v, now) for row in rows for k, v in row.items() if k != "step"]
                self.tell("log", stage.name, metrics)
            meta = artifact.manifest.meta
            tags = {
                "mixflow.weights": f"{artifact.full_uri}/weights.safetensors",
                "mixflow.weights_sha256": artifact.manifest.files["weights.safetensors"].sha256,
                "mixflow.checkpoints": meta.get("checkpoints", "none: the weights were given"),
                "mixflow.code": meta["code"],
            }
            self.tell("tags", stage.name, tags)

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        """Metrics and sample grids of every arm and seed; verdicts on the parent run."""
        experiment = self.workspace.experiment
        for name, arm in summary["arms"].items():
            trained = experiment.arms[name].train
            step = experiment.training.steps if trained else 0
            for k in arm["seeds"]:
                run = f"arms/{name}/{k}"
                if not trained:  # the base under sampling seed k has no training run of its own
                    tags = {"mixflow.arm": name, "mixflow.replicate": str(k)}
                    self.tell("start_run", run, f"{name}/{k}", {"post_training": "none"}, tags, EXPERIMENT)
                values = {
                    f"eval/{metric}/{cell}": interval["values"][k]
                    for cell, metrics in arm["metrics"].items()
                    for metric, interval in metrics.items()
                }
                self.tell("log", run, [Metric(key, step, value, _now_ms()) for key, value in values.items()])
                samples = self.workspace.result(f"samples/{name}/{k}")
                grids = [f"{samples.path}/{file}" for file in samples.manifest.files if file.endswith(".png")]
                self.tell("artifacts", run, grids, "grids")
                self.tell("tags", run, {"mixflow.samples": samples.full_uri})
                if not trained:
                    self.tell("end_run", run, "FINISHED")
        metric, _, cell = experiment.evaluation.primary.partition("/")
        means = {f"primary/{name}": arm["metrics"][cell][metric]["mean"] for name, arm in summary["arms"].items()}
        self.tell("log", EXPERIMENT, [Metric(key, 0, value, _now_ms()) for key, value in means.items()])
        verdicts = {f"mixflow.verdict.{name}": arm["verdict"]["verdict"] for name, arm in summary["arms"].items()}
        self.tell("tags", EXPERIMENT, verdicts)

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


def _now_ms() -> int:
    return int(time.time() * 1000)
