"""Experiment -> TorchTrainer -> result: the worker group that serves all stages in turn, and what it reports to."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from orchestration.cluster import NAMESPACE
from orchestration.storage import open_storage, workspace_id
from orchestration.tracking import Metric, Tracker
from orchestration.workflow import Stage, Workspace
from workers.io import StoppedError

log = logging.getLogger(__name__)
T = TypeVar("T")
TRACKED_KINDS = ("base", "arms", "trials")


class RunFailedError(Exception):
    """The run failed for a reason that running the same again would not change, or after all restarts."""


class DivergedError(RunFailedError):
    """The loss, or what was measured, was not finite."""


class ControllerDiedError(RunFailedError):
    """Ray Train's controller died. What it held stays taken until the driver leaves the cluster."""


@dataclass
class Pulse:
    """A worker's process, and when it last gave a sign of life.

    Attributes:
        group: name of its worker group's launch.
        rank: in its group.
        node: Ray's id of its node.
        address: of its node, for people.
        pid: of its process, of which there is one with this `born`.
        born: when the process was started, in seconds since the epoch.
        silent_s: seconds since its last sign of life.
    """

    group: str
    rank: int
    node: str
    address: str
    pid: int
    born: float
    silent_s: float = 0.0


class Reporter:
    """The one process that speaks to MLflow, and that knows how far the workers are; a Ray actor.

    Workers call `tell` without waiting for it, and `alive` all the time; the driver asks for `progress` and `pulses`.
    """

    def __init__(self, workspace: str, tracking_uri: str, experiment: str, home: str) -> None:
        storage = open_storage(workspace)
        self.home = f"{workspace_id(storage)}/{home}"  # MLflow may hold the same experiment of another workspace
        self.tracker = Tracker(storage, tracking_uri, experiment, f"tracking/{home.split('/')[-1]}")
        self.latest: dict[str, Any] = {}
        self.starts = 0
        self.refusals: dict[str, str] = {}
        self.warnings: list[str] = []
        self.ending = False
        self.stopping: set[str] = set()
        self.heard: dict[tuple[str, int], tuple[Pulse, float]] = {}
        logging.getLogger("orchestration").addHandler(_Warns(self))  # nobody reads this process's log

    def alive(self, pulse: Pulse) -> bool:
        """A sign of life of a worker; returns whether its group is to stop."""
        self.heard[pulse.group, pulse.rank] = pulse, time.monotonic()
        return self.ending or pulse.group in self.stopping

    def gone(self, group: str, rank: int | None = None) -> None:
        """A worker, or a whole group, that nothing more is to be expected from."""
        for key in [key for key in self.heard if key[0] == group and rank in (None, key[1])]:
            del self.heard[key]

    def pulses(self) -> list[Pulse]:
        """All workers, with how long each has been silent."""
        now = time.monotonic()
        return [replace(pulse, silent_s=now - at) for pulse, at in self.heard.values()]

    def stop(self, group: str) -> None:
        """Asks the workers of a group to stop."""
        self.stopping.add(group)

    def end(self) -> None:
        """Asks all workers to stop, for good, since the driver is to end."""
        self.ending = True

    def is_ending(self) -> bool:
        """Whether the driver is to end."""
        return self.ending

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
        """Starts or continues a run, as a child of `parent`'s where one is given; durable when it returns."""
        key = None if parent is None else self.key(parent)
        self.tracker.start_run(self.key(stage), name, parent=key, params=params, tags=tags)
        self.tracker.flush()  # MLflow refuses all else of a run whose start was lost with this process

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


class _Warns(logging.Handler):
    """Makes the warnings of the Reporter's own process, such as what MLflow refuses, warnings for the user."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.warn(" ".join(record.getMessage().split()))


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
    # Several calls at once: draining must not keep the workers' metrics waiting. What was asked of one that died is
    # asked of the next: nobody fails for it.
    handle = actor.options(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4, **options).remote(
        workspace.storage.uri, tracking_uri, workspace.experiment.name, workspace.home
    )
    return handle, options["name"]


def launch(
    workspace: Workspace, stages: list[Stage], reporter_name: str, max_failures: int, callbacks: Sequence[Any] = ()
) -> None:
    """Runs stages on a group of Ray Train workers.

    Ray restarts the group when a worker or a node dies, and each restart goes on where the workspace stands. A group
    whose workers were asked to stop, because a node goes away or comes, is started again too, and is no failure. Where
    the restarts are used up but something was kept since they were counted, they are counted anew: a run of days may
    lose any number of workers, and one that cannot go on ends soon.

    Args:
        workspace: of the experiment.
        stages: in their order.
        reporter_name: of the Reporter actor.
        max_failures: restarts of the group before anything new is kept; at 0 the first failure ends the run.
        callbacks: of Ray Train, which hear what the trial of a sweep reports.

    Raises:
        ControllerDiedError: Ray Train's controller died, and with it the run.
        DivergedError: the loss, or what was measured, was not finite.
        RunFailedError: an input was wrong, or the restarts were used up.
        StoppedError: the driver is to end, and the workers have stopped.
    """
    import ray

    reporter = ray.get_actor(reporter_name, NAMESPACE)
    while True:
        standing = workspace.standing(stages)
        try:
            answer = _fit(workspace, stages, reporter, reporter_name, max_failures, callbacks)
        except ControllerDiedError:
            raise
        except RunFailedError as error:
            if max_failures == 0 or not anything_kept(workspace, stages, standing):
                raise
            reporter.warn.remote(f"{error}; something was kept since the workers started, so they are started again")
            continue
        if "error" in answer:
            raise DivergedError(answer["error"])
        if "wrong_input" in answer:
            raise RunFailedError(answer["wrong_input"])
        if "stopped" not in answer:
            return
        ending: Any = ray.get(reporter.is_ending.remote())
        if ending:
            raise StoppedError(answer["stopped"])
        reporter.warn.remote(f"the workers were asked to stop, all {answer['stopped']}; starting again from there")


def anything_kept(workspace: Workspace, stages: list[Stage], standing: object) -> bool:
    """Whether something new is kept of the stages, whose `Workspace.standing` was this before."""
    try:
        return workspace.standing(stages) != standing
    except OSError as error:
        log.warning("whether anything was kept meanwhile cannot be said: %s", error)
        return False


def _fit(
    workspace: Workspace,
    stages: list[Stage],
    reporter: Any,
    reporter_name: str,
    max_failures: int,
    callbacks: Sequence[Any],
) -> dict[str, Any]:
    """One worker group with its restarts; what rank 0's `worker_entry` returned."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    from orchestration.worker import GroupConfig, worker_entry

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
    scaling: Any = ray.train.ScalingConfig  # to a type checker that of Train's first version, without elastic groups
    trainer = TorchTrainer(
        worker_entry,  # type: ignore[arg-type]  # its annotation forbids the return value that Result carries
        train_loop_config=config,
        torch_config=GroupConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=scaling(
            num_workers=cluster.num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
            elastic_resize_monitor_interval_s=math.inf,  # Ray would kill the workers where a node comes; see `watching`
        ),
        run_config=ray.train.RunConfig(
            name=config["name"],
            storage_path=f"{workspace.storage.uri}/ray",
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=list(callbacks),
        ),
    )
    try:
        result: Any = in_thread(trainer.fit)
    except ray.exceptions.ActorDiedError as error:
        raise ControllerDiedError("Ray Train's controller died; see the cluster's logs") from error
    except ray.train.TrainingFailedError as error:
        refused: Any = ray.get(reporter.refused.remote(config["name"]))
        if not refused and ray.get(reporter.is_ending.remote()):  # some stopped while others waited for them
            return {"stopped": "stopped; what was finished is kept"}
        raise RunFailedError(refused or cause_of(error)) from error
    finally:
        reporter.gone.remote(config["name"])
    return result.return_value or {}


def in_thread(work: Callable[[], T], timeout_s: float | None = None) -> T:
    """What `work` returns or raises, from a thread of its own: Ray Train then leaves this process's signals alone.

    Raises:
        TimeoutError: it did not in time; it may go on.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="fit").start()  # a second signal need not wait for it
    return answer.result(timeout_s)


def cache_directory() -> Path:
    """This machine's directory for fetched artifacts and memory maps, keyed by content; safe to remove between runs.

    Raises:
        ValueError: somebody else made it, or a link to it, who could change what is read from there.
    """
    path = Path(tempfile.gettempdir()) / f"mixflow-cache-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ValueError(f"{path} must be this user's own directory, got another's or a link; remove it or set TMPDIR")
    path.chmod(0o700)  # earlier ones may have been open to a group
    return path


def cause_of(error: BaseException) -> str:
    """The innermost reason of a Ray failure in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
