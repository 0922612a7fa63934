"""Experiment -> TorchTrainer -> result: the worker group that serves all stages in turn, and what it reports to."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestration.cluster import NAMESPACE
from orchestration.experiment import Experiment
from orchestration.storage import open_storage
from orchestration.tracking import Metric, Tracker
from orchestration.workflow import Stage, Workspace

TRACKED_KINDS = ("base", "arms", "trials")


class RunFailedError(Exception):
    """The run failed for a reason that running the same again would not change, or after all restarts."""


class DivergedError(RunFailedError):
    """The loss, or what was measured, was not finite."""


class ControllerDiedError(RunFailedError):
    """Ray Train's controller died. What it held stays taken until the driver leaves the cluster."""


class Reporter:
    """The one process that speaks to MLflow, and that knows how far the workers are; a Ray actor.

    Workers call `tell` without waiting for it; the driver asks for `progress`.
    """

    def __init__(self, workspace: str, tracking_uri: str, experiment: str, home: str) -> None:
        self.home = home
        self.tracker = Tracker(open_storage(workspace), tracking_uri, experiment, f"tracking/{home.split('/')[-1]}")
        self.latest: dict[str, Any] = {}
        self.starts = 0
        self.refusals: dict[str, str] = {}
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        """A warning of a worker, for the user to see: once, since every worker may say it."""
        if text not in self.warnings:
            self.warnings.append(text)

    def refuse(self, launched: str, why: str) -> None:
        """Why a worker of a launch cannot go on, which another start would not change."""
        self.refusals[launched] = why

    def refused(self, launched: str) -> str:
        """What `refuse` was told of a launch; "" if nothing."""
        return self.refusals.get(launched, "")

    def started(self) -> None:
        """A worker group begins, for the first time or again."""
        self.starts += 1

    def tell(self, stage: str, done: int, total: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        """Progress of a stage and metrics of its run at step `done`."""
        self.latest = {"stage": stage, "done": done, "total": total, "metrics": dict(metrics)}
        if metrics and stage.split("/")[0] in TRACKED_KINDS:
            self.tracker.log(self.key(stage), [Metric(k, done, v, timestamp_ms) for k, v in metrics.items()])

    def progress(self) -> dict[str, Any]:
        """What was told last, how often a worker group began, and all warnings."""
        return {**self.latest, "starts": self.starts, "warnings": self.warnings}

    def key(self, stage: str) -> str:
        """Key of a stage's run; "" is the experiment's own."""
        return f"{self.home}/{stage}" if stage else self.home

    def start_run(
        self, stage: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
    ) -> None:
        """Starts or continues a run, as a child of `parent`'s where one is given."""
        key = None if parent is None else self.key(parent)
        self.tracker.start_run(self.key(stage), name, parent=key, params=params, tags=tags)

    def log(self, stage: str, metrics: list[Metric]) -> None:
        """Metrics of a run; what MLflow has already is not sent again."""
        self.tracker.log(self.key(stage), metrics)

    def artifacts(self, stage: str, paths: list[str], artifact_path: str) -> None:
        """Copies objects of the workspace to a run's artifacts."""
        for path in paths:
            self.tracker.artifact(self.key(stage), path, artifact_path)

    def tags(self, stage: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a run."""
        self.tracker.tags(self.key(stage), tags)

    def register(self, stage: str, model: str, source: str, alias: str, tags: Mapping[str, str]) -> None:
        """Makes a run's weights a version of a registered model."""
        self.tracker.register(self.key(stage), model, source=source, alias=alias, tags=tags)

    def end_run(self, stage: str, status: str) -> None:
        """Ends a run."""
        self.tracker.end_run(self.key(stage), status)

    def drain(self, timeout_s: float) -> dict[str, Any]:
        """Waits while MLflow takes what there is; returns the tracker's status and the experiment's MLflow run."""
        self.tracker.drain(timeout_s)
        return {**self.tracker.status(), "run_id": self.tracker.run_id(self.home)}


def start_reporter(workspace: Workspace, tracking_uri: str) -> tuple[Any, str]:
    """The Reporter actor, beside the driver; Ray restarts it if it dies, and its spool goes on."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Reporter)
    options: dict[str, Any] = {
        "name": f"reporter-{uuid.uuid4().hex[:8]}",
        "namespace": NAMESPACE,
        "scheduling_strategy": here,
    }
    # Several calls at once: draining must not keep the workers' metrics waiting.
    handle = actor.options(num_cpus=0, max_restarts=-1, max_concurrency=4, **options).remote(
        workspace.storage.uri, tracking_uri, workspace.experiment.name, workspace.home
    )
    return handle, options["name"]


def launch(
    workspace: Workspace, stages: list[Stage], reporter_name: str, max_failures: int, callbacks: Sequence[Any] = ()
) -> None:
    """Runs stages on a group of Ray Train workers.

    Ray restarts the group when a worker or a node dies, and each restart goes on where the workspace stands.

    Args:
        workspace: of the experiment.
        stages: in their order.
        reporter_name: of the Reporter actor.
        max_failures: restarts of the group.
        callbacks: of Ray Train, which hear what the trial of a sweep reports.

    Raises:
        ControllerDiedError: Ray Train's controller died, and with it the run.
        DivergedError: the loss, or what was measured, was not finite.
        RunFailedError: an input was wrong, or the restarts were used up.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = workspace.experiment.cluster
    config: dict[str, Any] = {
        "experiment": workspace.experiment.model_dump_json(),
        "workspace": workspace.storage.uri,
        "stages": [stage.name for stage in stages],
        "reporter": reporter_name,
        "trial": workspace.trial,
        # Never the same name twice: Ray would take up its own record of the run, ours is the workspace.
        "name": f"{workspace.experiment.name}-{uuid.uuid4().hex[:8]}",
    }
    gpu = cluster.gpus_per_worker > 0
    trainer = TorchTrainer(
        worker_entry,  # type: ignore[arg-type]  # its annotation forbids the return value that Result carries
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=config["name"],
            storage_path=f"{workspace.storage.uri}/ray",
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=list(callbacks),
        ),
    )
    try:
        result: Any = trainer.fit()
    except ray.exceptions.ActorDiedError as error:
        raise ControllerDiedError("Ray Train's controller died; see the cluster's logs") from error
    except ray.train.TrainingFailedError as error:
        raise RunFailedError(cause_of(error)) from error
    answer = result.return_value or {}
    if "error" in answer:
        raise DivergedError(answer["error"])
    if "wrong_input" in answer:
        raise RunFailedError(answer["wrong_input"])


def worker_entry(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train starts on each worker: the thin layer between Ray and the stages."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from orchestration.site import Site
    from orchestration.stages import run_stages
    from workers.train import NonFiniteLossError

    experiment = Experiment.model_validate_json(config["experiment"])
    torch.set_num_threads(max(1, int(experiment.cluster.cpus_per_worker)))
    context = ray.train.get_context()
    reporter = ray.get_actor(config["reporter"], NAMESPACE)
    why: Any = ray.get(reporter.refused.remote(config["name"]))
    if why:
        return {"wrong_input": why}

    def tell(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        reporter.tell.remote(stage, done, total, metrics, int(time.time() * 1000))

    def rung(step: int, value: float) -> None:
        ray.train.report({"step": step, "objective": value})

    workspace = Workspace(experiment, open_storage(config["workspace"]), config["trial"])
    site = Site(
        workspace=workspace,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device() if experiment.cluster.gpus_per_worker else torch.device("cpu"),
        cache=cache_directory(),
        tell=tell,
        rung=rung,
    )
    if site.rank == 0 and not config["trial"]:  # each trial has a group of its own
        reporter.started.remote()
    for package in ("workers", "orchestration"):
        logging.getLogger(package).addHandler(_Forward(reporter))
    try:
        run_stages(site, [workspace.stages[name] for name in config["stages"]])
    except NonFiniteLossError as error:
        # Raised on all ranks together, and again on every restart: returned, so that Ray makes none.
        return {"error": str(error)}
    except ValueError as error:
        # Of one rank alone, while others wait for it: Ray has to end them, and the next start ends the run.
        ray.get(reporter.refuse.remote(config["name"], " ".join(str(error).split())))
        raise
    return {}


class _Forward(logging.Handler):
    """Hands a worker's warnings (a checkpoint set aside, for instance) to the Reporter, since nobody reads its log."""

    def __init__(self, reporter: Any) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.warn.remote(" ".join(record.getMessage().split()))


def cache_directory() -> Path:
    """This machine's directory for fetched artifacts and memory maps, keyed by content; safe to remove between runs."""
    return Path(tempfile.gettempdir()) / f"mixflow-cache-{os.getuid()}"


def cause_of(error: BaseException) -> str:
    """The innermost reason of a Ray failure in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
