"""The driver's part of a run: check everything, run what is still to do, track it, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from orchestration import cluster, mlflow_server, results
from orchestration.encode import encode
from orchestration.experiment import Experiment
from orchestration.figures import slow_flow_plot
from orchestration.given import Given, given_base, given_guide, given_weights
from orchestration.inputs import check_data, check_inputs, least_held_out
from orchestration.launch import ControllerDiedError, Reporter, anything_kept, launch, start_reporter
from orchestration.lease import WAIT_S, HeldError
from orchestration.progress import Progress
from orchestration.recording import Recorder
from orchestration.report import text_table, write_report
from orchestration.s3_client import s3_environment
from orchestration.storage import Storage, open_storage
from orchestration.watch import watching
from orchestration.workflow import Stage, Workspace, code_version, needed_for
from workers.data import digits as digit_images
from workers.disk import scratch_directory
from workers.io import StoppedError
from workers.shards import write_shards


@dataclass
class Place:
    """Where an experiment is kept and tracked, checked."""

    storage: Storage
    tracking_uri: str
    warnings: list[str]


def open_place() -> Place:
    """The workspace and the tracking URI of the environment, after trying both.

    Raises:
        ValueError: one of them cannot be used; a tracking server that does not answer is only a warning.
    """
    storage = open_workspace()
    tracking_uri = mlflow_server.default_tracking_uri(storage)
    with _of_workspace():
        storage.check()
    warning = mlflow_server.check_tracking(tracking_uri)
    return Place(storage, tracking_uri, [warning] if warning else [])


def open_workspace() -> Storage:
    """The workspace of the environment, not tried yet.

    Raises:
        ValueError: it cannot be meant.
    """
    os.environ.update(s3_environment(os.environ))
    uri = os.environ.get("MIXFLOW_WORKSPACE", "")
    if cluster.inside_job() and not (uri.startswith(("s3://", "/", "file:"))):
        raise ValueError(
            "MIXFLOW_WORKSPACE must be an s3:// URI or an absolute path on a shared disk inside a Ray job, "
            f"got {uri!r}; give it in the job's runtime environment"
        )
    with _of_workspace():
        return open_storage(uri or "./mixflow-workspace")


@contextmanager
def _of_workspace() -> Iterator[None]:
    """Gives what is wrong with the storage the name under which it was given."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"MIXFLOW_WORKSPACE: {error}") from error


def run_experiment(
    experiment: Experiment,
    place: Place,
    *,
    targets: Callable[[Stage], bool] = lambda stage: True,
    force: tuple[str, ...] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Runs the stages that are targets, with all they need, and returns what `--json` prints.

    Raises:
        ValueError, CorruptError: wrong input, before any worker is started.
        RunFailedError: the run itself failed.
        StoppedError: this process was asked to end, and the workers have stopped.
    """
    workspace = Workspace(experiment, place.storage)
    record = f"{workspace.home}/experiment.json"
    if resume and not place.storage.exists(record):
        raise ValueError(
            f"--resume needs an earlier run of {experiment.name} with these settings in {place.storage.uri}"
        )
    stages = needed_for(list(workspace.stages.values()), targets)
    forced = _forced(stages, force)
    warnings = check_inputs(workspace, forced).warnings
    if not all(stage.on_driver for stage in workspace.pending(stages)):
        cluster.check_local_machine(experiment.cluster)
    with workspace.lease() as lease, ExitStack() as cleanup:
        workspace.forget(forced)
        place.storage.put(record, experiment.model_dump_json(indent=1).encode())
        states = {stage.name: workspace.state(stage.name) for stage in stages}
        progress = Progress([s.name for s in stages], sum(state != "to do" for state in states.values()))
        cleanup.callback(progress.close)
        for line in [*place.warnings, *_stale(states), *warnings]:
            progress.say(f"warning: {line}")
        _driver_stages(workspace, stages, progress, cleanup)
        pending = [stage for stage in workspace.pending(stages) if not stage.on_driver]
        restarts = experiment.cluster.max_failures
        while True:
            reporter, name = open_reporter(workspace, place, bool(pending), cleanup, progress)
            recorder = Recorder(workspace, stages, reporter, is_actor=bool(pending))
            try:
                recorder.start()
                if pending:
                    standing = workspace.standing(pending)
                    watch = watching(reporter, experiment.cluster, progress.say, lease)
                    with progress.following(recorder.progress), watch:
                        launch(workspace, pending, name, experiment.cluster.max_failures)
                outcome = _finish(workspace, stages, states, recorder, progress)
                break
            except ControllerDiedError as error:
                if anything_kept(workspace, pending, standing):
                    restarts = experiment.cluster.max_failures
                if restarts == 0:
                    recorder.end_badly("FAILED")
                    raise
                restarts -= 1
                progress.say(f"warning: {error}; starting again, going on from there")
                _leave_cluster()
            except (KeyboardInterrupt, StoppedError):
                recorder.end_badly("KILLED")
                raise
            except BaseException:
                recorder.end_badly("FAILED")
                raise
        outcome["tracking"] = delivered(recorder, place, progress)
        return outcome


def _forced(stages: list[Stage], names: tuple[str, ...]) -> list[str]:
    """The stages that --force names, by name or kind; the last first, since a stage is found by its inputs."""
    found: list[str] = []
    for name in names:
        named = [stage.name for stage in stages if f"{stage.name}/".startswith(f"{name}/")]
        if not named:
            kinds = ", ".join(dict.fromkeys(stage.kind for stage in stages))
            raise ValueError(
                f"--force must name a stage or a kind of stages ({kinds}), got {name!r}; plan lists them all"
            )
        found += named
    return [stage.name for stage in reversed(stages) if stage.name in found]


def _stale(states: Mapping[str, str]) -> list[str]:
    stale = [name for name, state in states.items() if state == "stale"]
    if not stale:
        return []
    return [f"{len(stale)} stages were made by another version of the code and are kept; --force {stale[0]} redoes one"]


def _encode(workspace: Workspace, cleanup: ExitStack, progress: Progress) -> None:
    """The data stage of images that are still to be encoded: the only one that Ray Data works on."""
    experiment, asked = workspace.experiment, workspace.experiment.cluster
    assert experiment.data.images, "the caller knows"
    assert experiment.codec, "the experiment was validated"
    join_cluster(workspace, cleanup, progress)
    is_elastic = asked.least_workers < asked.most_workers
    num_workers = min(asked.most_workers, cluster.room_for(asked)) if is_elastic else asked.most_workers

    def tell(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        progress.show({"stage": stage, "done": done, "total": total, "metrics": metrics})

    encode(
        workspace.storage,
        workspace.path("data"),
        experiment.data.images,
        experiment.codec,
        num_workers=num_workers,
        cpus_per_worker=asked.cpus_per_worker,
        gpus_per_worker=asked.gpus_per_worker,
        tell=tell,
        least_held_out=least_held_out(experiment),
        about={"stage": "data", "code": code_version()},
    )
    check_data(workspace)


def _driver_stages(workspace: Workspace, stages: list[Stage], progress: Progress, cleanup: ExitStack) -> None:
    """Data and given checkpoints, each by one process at a time: experiments share them."""
    given = {g.stage: g for g in (given_base(workspace.experiment), given_guide(workspace.experiment)) if g}
    for name in [stage.name for stage in stages if stage.name == "data" or stage.name in given]:
        if workspace.artifact(name) is not None:
            continue
        with ExitStack() as lease:
            _wait_for(workspace, name, lease, progress)
            if workspace.artifact(name) is not None:
                continue
            if name in given:
                _copy_given(workspace, given[name])
            elif workspace.experiment.data.images:
                _encode(workspace, cleanup, progress)
            else:
                _write_digits(workspace)
        progress.show({"stage": name, "done": 1, "total": 1, "metrics": {}})


def _wait_for(workspace: Workspace, stage: str, lease: ExitStack, progress: Progress) -> None:
    """Holds a stage's lease, once nobody else does."""
    told = False
    while True:
        try:
            lease.enter_context(workspace.lease(stage))
            return
        except HeldError as error:
            if not told:
                progress.say(f"warning: {error}; its result is waited for")
            told = True
            time.sleep(WAIT_S)


def _write_digits(workspace: Workspace) -> None:
    start, digits = time.monotonic(), workspace.experiment.data.digits
    assert digits, "shards that are given were checked before"
    with scratch_directory() as scratch:
        write_shards(digit_images(digits.image_size, digits.held_out), scratch, num_classes=10)
        workspace.publish("data", scratch, seconds=time.monotonic() - start)


def _copy_given(workspace: Workspace, given: Given) -> None:
    from workers.models.checkpoints import save_weights

    start = time.monotonic()
    with scratch_directory() as scratch, given_weights(given) as weights:
        save_weights(weights, scratch / "weights.safetensors")
        workspace.publish(given.stage, scratch, seconds=time.monotonic() - start)


def _leave_cluster() -> None:
    """Ends this driver's part in the cluster, and everything that Ray keeps for it."""
    import ray

    ray.shutdown()


def open_reporter(
    workspace: Workspace, place: Place, with_workers: bool, cleanup: ExitStack, progress: Progress
) -> tuple[Any, str]:
    """The Reporter: an actor on the cluster (and its name) while there is work for workers, else an object here."""
    if not with_workers:
        reporter = Reporter(place.storage.uri, place.tracking_uri, workspace.experiment.name, workspace.home)
        cleanup.callback(reporter.tracker.close)
        return reporter, ""
    join_cluster(workspace, cleanup, progress)
    return start_reporter(workspace, place.tracking_uri)


def join_cluster(workspace: Workspace, cleanup: ExitStack, progress: Progress, *, dashboard: bool = False) -> None:
    """Makes this process the driver of a cluster that can hold the experiment, if it is not yet."""
    if cluster.is_joined():
        return
    address = os.environ.get("RAY_ADDRESS")
    progress.shown = f"joining {address}" if address else "starting Ray"
    progress.say(progress.shown)
    cluster.connect(s3_environment(os.environ), dashboard=dashboard)
    cleanup.callback(_leave_cluster)
    cluster.check_resources(workspace.experiment.cluster, progress.say)
    cluster.check_shared(workspace.storage)
    progress.shown = "starting the workers"


def _finish(
    workspace: Workspace, stages: list[Stage], before: Mapping[str, str], recorder: Recorder, progress: Progress
) -> dict[str, Any]:
    """Report and tracking from what lies in the workspace, whoever computed it."""
    outcome: dict[str, Any] = {"workspace": workspace.storage.uri, "experiment": workspace.home}
    names = [stage.name for stage in stages]
    recorder.training()
    measured = [name for name in names if name.startswith("slow-flow/")]
    if measured:  # the base's, or that of the one arm that was asked for
        outcome["slow_flow"] = _place_slow_flow(workspace, measured[0])
        recorder.artifacts([outcome["slow_flow"]["plot"].removeprefix(f"{workspace.storage.uri}/")])
    kinds = {stage.kind for stage in stages}
    if "metrics" in kinds:
        summary = results.summarise(workspace)
        outcome.update(arms=_arms(summary), table=text_table(summary))
        recorder.evaluation(summary)
        if "report" in kinds:
            _make_report(workspace, summary, progress)
            outcome["report"] = _place_report(workspace)
            report = workspace.result("report")
            recorder.artifacts([f"{report.path}/{name}" for name in report.manifest.files])
    elif "samples" in kinds:
        outcome["samples"] = {n: workspace.result(n).full_uri for n in names if n.startswith("samples/")}
    elif kinds == {"data"}:
        outcome["data"] = _data(workspace)
    elif "arms" in kinds:
        outcome["weights"] = {n: workspace.result(n).full_uri for n in names if n.startswith("arms/")}
    recorder.end("FINISHED")
    outcome["stages"] = [
        {
            "name": name,
            "state": "done" if before[name] == "to do" else "reused",
            "seconds": artifact.manifest.meta.get("seconds"),
        }
        for name in names
        if (artifact := workspace.artifact(name))
    ]
    return outcome


def _make_report(workspace: Workspace, summary: Mapping[str, Any], progress: Progress) -> None:
    if workspace.artifact("report") is None:
        start = time.monotonic()
        with scratch_directory() as scratch:
            write_report(workspace, summary, scratch)
            workspace.publish("report", scratch, seconds=time.monotonic() - start)
        progress.show({"stage": "report", "done": 1, "total": 1, "metrics": {}})


def _data(workspace: Workspace) -> dict[str, Any]:
    """Where the data lie, how many images they are by split, of how many in their source, and which are unreadable."""
    artifact = workspace.result("data")
    splits = {name: found["num_images"] for name, found in json.loads(artifact.read("statistics.json")).items()}
    unreadable = json.loads(artifact.read("unreadable.json")) if "unreadable.json" in artifact.manifest.files else []
    return {
        "uri": artifact.full_uri,
        "num_images": sum(splits.values()),
        "num_in_source": artifact.manifest.meta.get("num_images"),
        "splits": splits,
        "unreadable": unreadable,
    }


def _place_slow_flow(workspace: Workspace, stage: str) -> dict[str, Any]:
    """A model's measurement with a plot of it at a place that can be remembered."""
    artifact, of = workspace.result(stage), stage.partition("/")[2]
    measured = json.loads(artifact.read("slow_flow.json"))
    plot = f"{workspace.home}/slow_flow_{of}.png"
    columns = {f"{of}, {sampler}": read for sampler, read in measured["samplers"].items()}
    workspace.storage.put(plot, slow_flow_plot(columns))
    uri = workspace.storage.uri
    return {"of": of, "plot": f"{uri}/{plot}", "measured": f"{artifact.full_uri}/slow_flow.json", **measured}


def _arms(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, **arm, "verdict": arm["verdict"]["verdict"]} for name, arm in summary["arms"].items()]


def _place_report(workspace: Workspace) -> str:
    """A copy of the report at a place that can be remembered; returns its URI."""
    artifact = workspace.result("report")
    for name in artifact.manifest.files:
        workspace.storage.put(f"{workspace.home}/{name}", artifact.read(name))
    return f"{workspace.storage.uri}/{workspace.home}/report.html"


def delivered(recorder: Recorder, place: Place, progress: Progress) -> dict[str, Any]:
    """Where MLflow has it, after waiting for MLflow; a warning where it has not taken everything."""
    status, shown = recorder.delivered(), mlflow_server.without_password(place.tracking_uri)
    if status["pending"]:
        progress.say(
            f"warning: MLflow at {shown} has not taken {status['pending']} events "
            f"({status['last_error']}); they are kept, `mixflow replay` sends them later"
        )
    if status["rejected"]:
        progress.say(f"warning: MLflow at {shown} refused {status['rejected']} events; what it said is told above")
    return {"uri": shown, "parent_run": status["run_id"], **{name: status[name] for name in ("pending", "rejected")}}
