"""The driver's part of a run: check everything, run what is still to do, track it, report."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration import cluster, results, tracking
from orchestration.encode import encode
from orchestration.experiment import LEAST_HELD_OUT, Experiment
from orchestration.figures import slow_flow_plot
from orchestration.launch import ControllerDiedError, Reporter, cache_directory, launch, start_reporter
from orchestration.progress import Progress
from orchestration.recording import Recorder
from orchestration.report import text_table, write_report
from orchestration.storage import Storage, open_storage, s3_environment
from orchestration.workflow import Stage, Workspace, code_version, needed_for
from workers import data as images
from workers.codecs import CodecConfig, latent_shape_of
from workers.encode import plan_encoding
from workers.manifest import measure
from workers.models.family import ModelConfig


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
    tracking_uri = tracking.default_tracking_uri(storage)
    storage.check()
    warning = tracking.check_tracking(tracking_uri)
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
    return open_storage(uri or "./mixflow-workspace")


def check_inputs(workspace: Workspace) -> None:
    """Reads everything that was given or that an earlier run left, before any worker is started.

    Raises:
        ValueError: data or a checkpoint that cannot be used; CorruptError: an artifact that was altered.
    """
    experiment, cache = workspace.experiment, cache_directory()
    if experiment.data.shards:
        with _readable("data.shards", experiment.data.shards):
            if workspace.artifact("data") is None:
                raise ValueError(
                    f"data.shards must be a directory with a manifest.json, got {experiment.data.shards!r}; "
                    "publish it, or correct the URI"
                )
    if experiment.codec:
        _check_codec(experiment, experiment.codec)
    if workspace.artifact("data"):
        _check_data(workspace)
    elif experiment.data.images and experiment.codec:
        with _readable("data.images.source", experiment.data.images.source), _of_section("data.images"):
            found = plan_encoding(experiment.data.images, experiment.codec).recipe.num_classes
        if found != experiment.model.num_classes:
            raise ValueError(
                f"model.num_classes must be the {found} of data.images.source, got {experiment.model.num_classes}"
            )
    given = {"base": _given_base(experiment), "guide": _given_guide(experiment)}
    for name, checkpoint in given.items():
        if checkpoint and workspace.artifact(name) is None:
            with _given_weights(checkpoint):
                pass  # readable, of the right hash and architecture
    for stage in workspace.stages.values():
        artifact = workspace.artifact(stage.name)
        if artifact and workspace.storage.is_local:  # elsewhere what is read is verified when it is read
            artifact.fetch(cache)


def _check_data(workspace: Workspace) -> None:
    directory = workspace.result("data").fetch(cache_directory())
    for split in images.SPLITS:
        _check_split(workspace.experiment, split, directory)


def _check_split(experiment: Experiment, name: images.Split, directory: Path) -> None:
    """Every shard: whether it is sound, and fits the model, the codec and the metrics."""
    model, codec = experiment.model, experiment.codec.description if experiment.codec else None
    present: set[int] = set()
    count = 0
    for part, num_classes in images.read_shards(directory, name):
        present |= set(part.labels.tolist())
        count += len(part.labels)
        if part.codec != codec:
            _refuse_codec(part.codec, codec)
        if part.shape != (model.in_channels, model.input_size, model.input_size):
            raise ValueError(
                f"model.input_size and in_channels must fit the data's shape {part.shape}, "
                f"got {model.input_size} and {model.in_channels}"
            )
        if num_classes != model.num_classes:
            raise ValueError(f"model.num_classes must be the data's {num_classes}, got {model.num_classes}")
        if (model.family == "sd3") != (part.captions is not None):
            raise ValueError(
                f"data must have {'captions' if model.family == 'sd3' else 'labels'} for model.family "
                f"{model.family}, got the other; encode it for this model"
            )
        if part.codec is None and part.images.dtype != "uint8":
            raise ValueError(f"data must be uint8 pixels, got {part.images.dtype} in {name}; the metrics read pixels")
        if part.codec is not None and part.pixels is None:
            raise ValueError(
                f"data must keep the pixels of {name}, which the metrics read; set data.images.keep_pixels: all"
            )
        if experiment.alignment_weight and name == "train":
            _check_features(experiment, part)
    absent = sorted(set(range(model.num_classes)) - present)
    if name == "train" and absent and model.family != "sd3":
        raise ValueError(f"data must hold training images of every class, got none of class {absent[0]}; add some")
    if name == "held_out" and count < LEAST_HELD_OUT:
        raise ValueError(f"data must hold out at least {LEAST_HELD_OUT} images to compare with, got {count}; add some")


def _refuse_codec(found: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None) -> None:
    if found is None or wanted is None:
        kinds = [codec["kind"] if codec else "pixels" for codec in (found, wanted)]
        raise ValueError(f"codec must be that of the data, {kinds[0]}, got {kinds[1]}; correct codec or the data")
    key = next(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
    raise ValueError(
        f"codec.{key} must be the data's {found.get(key)!r}, got {wanted.get(key)!r}; encode the data anew"
    )


def _check_features(experiment: Experiment, part: images.ImageSet) -> None:
    wanted = (experiment.model.num_tokens, experiment.model.projector_dims[0])  # type: ignore[union-attr]
    found = None if part.features is None else part.features.shape[1:]
    if found != wanted:
        raise ValueError(
            f"data must hold alignment features of {wanted[0]} tokens and width {wanted[1]}, got {found or 'none'}; "
            "encode them with data.images.features, or set alignment_weight: 0"
        )


def _check_codec(experiment: Experiment, config: CodecConfig) -> None:
    """Opens it: hashes, files, and the shape of its latents."""
    with _of_section("codec"):
        shape = latent_shape_of(config)
    model = experiment.model
    if shape != (model.in_channels, model.input_size, model.input_size):
        raise ValueError(
            f"model.in_channels and input_size must fit the codec's latents {shape}, "
            f"got {model.in_channels} and {model.input_size}"
        )


@contextmanager
def _readable(name: str, uri: str) -> Iterator[None]:
    """What was given may lie in another storage than the workspace, which nobody has tried yet."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name} must be readable, got {uri!r} ({error}); correct the URI or the access") from error


@contextmanager
def _of_section(name: str) -> Iterator[None]:
    """Says to which section of the file a worker's complaint belongs."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(f"{name}.{text}" if text[:1].isalpha() else f"{name}: {text}") from error


@dataclass(frozen=True)
class _Given:
    """A checkpoint that the experiment names."""

    where: str
    uri: str
    sha256: str
    model: ModelConfig


def _given_base(experiment: Experiment) -> _Given | None:
    base = experiment.base
    if not base.checkpoint:
        return None
    return _Given("base", base.checkpoint, base.sha256 or "", experiment.model)


def _given_guide(experiment: Experiment) -> _Given | None:
    guide = experiment.guide
    return _Given("guide", guide.checkpoint, guide.sha256, guide.model) if guide else None


@contextmanager
def _given_weights(given: _Given) -> Any:
    """A local, verified, strictly fitting copy of given weights as a state dict."""
    from workers.models.checkpoints import check_architecture, load_weights

    folder, _, name = given.uri.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="mixflow-given-") as scratch:
        storage = open_storage(folder or ("/" if given.uri.startswith("/") else "."))
        path = Path(storage.uri) / name if storage.is_local else Path(scratch) / name
        if not storage.is_local:
            with _readable(f"{given.where}.checkpoint", given.uri):
                path.write_bytes(storage.read(name))
        if path.is_dir():
            raise ValueError(
                f"{given.where}.checkpoint must be a file, got the directory {given.uri!r}; "
                "mixflow import makes a file of a diffusers directory"
            )
        if not path.is_file():
            raise ValueError(f"{given.where}.checkpoint must be a file, got {given.uri!r}, which does not exist")
        found = measure(path).sha256
        if found != given.sha256:
            raise ValueError(
                f"{given.where}.sha256 must be the checkpoint's {found}, got {given.sha256}; the file is another one"
            )
        weights = load_weights(path)
        check_architecture(weights, given.model, given.uri)
        yield weights


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
    """
    workspace = Workspace(experiment, place.storage)
    record = f"{workspace.home}/experiment.json"
    if resume and not place.storage.exists(record):
        raise ValueError(
            f"--resume needs an earlier run of {experiment.name} with these settings in {place.storage.uri}"
        )
    stages = needed_for(list(workspace.stages.values()), targets)
    forced = _forced(stages, force)
    check_inputs(workspace)
    if not all(stage.on_driver for stage in workspace.pending(stages)):
        cluster.check_local_machine(experiment.cluster)
    with workspace.lease(), ExitStack() as cleanup:
        for name in forced:
            workspace.forget(name)
        place.storage.put(record, experiment.model_dump_json(indent=1).encode())
        states = {stage.name: workspace.state(stage.name) for stage in stages}
        progress = Progress([s.name for s in stages], sum(state != "to do" for state in states.values()))
        cleanup.callback(progress.close)
        for line in [*place.warnings, *_stale(states)]:
            progress.say(f"warning: {line}")
        if experiment.data.images and workspace.artifact("data") is None:
            _encode(workspace, cleanup, progress)
        _driver_stages(workspace, stages, progress)
        pending = [stage for stage in workspace.pending(stages) if not stage.on_driver]
        restarts = experiment.cluster.max_failures
        while True:
            reporter, name = _open_reporter(workspace, place, bool(pending), cleanup, progress)
            recorder = Recorder(workspace, stages, reporter, is_actor=bool(pending))
            try:
                recorder.start()
                if pending:
                    with progress.following(recorder.progress):
                        launch(workspace, pending, name, restarts)
                outcome = _finish(workspace, stages, states, recorder, progress)
                break
            except ControllerDiedError as error:
                if restarts == 0:
                    raise
                restarts -= 1
                progress.say(f"warning: {error}; starting again, going on from there")
                _leave_cluster()
            except BaseException as error:
                recorder.end_badly("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
        outcome["tracking"] = _delivered(recorder, place, progress)
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
    _join(workspace, cleanup, progress)

    def tell(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        progress.show({"stage": stage, "done": done, "total": total, "metrics": metrics})

    encode(
        workspace.storage,
        workspace.path("data"),
        experiment.data.images,
        experiment.codec,
        num_workers=asked.num_workers,
        cpus_per_worker=asked.cpus_per_worker,
        gpus_per_worker=asked.gpus_per_worker,
        tell=tell,
        about={"stage": "data", "code": code_version()},
    )
    _check_data(workspace)


def _driver_stages(workspace: Workspace, stages: list[Stage], progress: Progress) -> None:
    """Data and a given base: they need no worker."""
    names = [stage.name for stage in stages]
    if "data" in names and workspace.artifact("data") is None:
        with tempfile.TemporaryDirectory(prefix="mixflow-") as scratch:
            start, digits = time.monotonic(), workspace.experiment.data.digits
            assert digits, "shards that are given were checked, and images encoded, before"
            images.write_shards(images.digits(digits.image_size, digits.held_out), Path(scratch), num_classes=10)
            workspace.publish("data", Path(scratch), seconds=time.monotonic() - start)
        progress.show({"stage": "data", "done": 1, "total": 1, "metrics": {}})
    for name, given in (("base", _given_base(workspace.experiment)), ("guide", _given_guide(workspace.experiment))):
        if name not in names or given is None or workspace.artifact(name) is not None:
            continue
        from workers.models.checkpoints import save_weights

        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mixflow-") as scratch, _given_weights(given) as weights:
            save_weights(weights, Path(scratch) / "weights.safetensors")
            workspace.publish(name, Path(scratch), seconds=time.monotonic() - start)
        progress.show({"stage": name, "done": 1, "total": 1, "metrics": {}})


def _leave_cluster() -> None:
    """Ends this driver's part in the cluster, and everything that Ray keeps for it."""
    import ray

    ray.shutdown()


def _open_reporter(
    workspace: Workspace, place: Place, with_workers: bool, cleanup: ExitStack, progress: Progress
) -> tuple[Any, str]:
    """The Reporter: an actor on the cluster (and its name) while there is work for workers, else an object here."""
    if not with_workers:
        reporter = Reporter(place.storage.uri, place.tracking_uri, workspace.experiment.name, workspace.home)
        cleanup.callback(reporter.tracker.close)
        return reporter, ""
    _join(workspace, cleanup, progress)
    return start_reporter(workspace, place.tracking_uri)


def _join(workspace: Workspace, cleanup: ExitStack, progress: Progress) -> None:
    """Makes this process the driver of a cluster that can hold the experiment, if it is not yet."""
    if cluster.is_joined():
        return
    progress.say("starting Ray" if not os.environ.get("RAY_ADDRESS") else f"joining {os.environ['RAY_ADDRESS']}")
    cluster.connect(s3_environment(os.environ))
    cleanup.callback(_leave_cluster)
    cluster.check_resources(workspace.experiment.cluster)
    cluster.check_shared(workspace.storage)


def _finish(
    workspace: Workspace, stages: list[Stage], before: Mapping[str, str], recorder: Recorder, progress: Progress
) -> dict[str, Any]:
    """Report and tracking from what lies in the workspace, whoever computed it."""
    outcome: dict[str, Any] = {"workspace": workspace.storage.uri, "experiment": workspace.home}
    names = [stage.name for stage in stages]
    recorder.training()
    if "slow-flow/base" in names:
        outcome["slow_flow"] = _place_slow_flow(workspace)
        recorder.artifacts([f"{workspace.home}/slow_flow_base.png"])
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
        with tempfile.TemporaryDirectory(prefix="mixflow-") as scratch:
            write_report(workspace, summary, Path(scratch))
            workspace.publish("report", Path(scratch), seconds=time.monotonic() - start)
        progress.show({"stage": "report", "done": 1, "total": 1, "metrics": {}})


def _place_slow_flow(workspace: Workspace) -> dict[str, Any]:
    """The base's measurement with a plot of it at a place that can be remembered."""
    artifact = workspace.result("slow-flow/base")
    measured = json.loads(artifact.read("slow_flow.json"))
    plot = f"{workspace.home}/slow_flow_base.png"
    workspace.storage.put(plot, slow_flow_plot({"base": measured}))
    return {"plot": f"{workspace.storage.uri}/{plot}", **measured}


def _arms(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, **arm, "verdict": arm["verdict"]["verdict"]} for name, arm in summary["arms"].items()]


def _place_report(workspace: Workspace) -> str:
    """A copy of the report at a place that can be remembered; returns its URI."""
    artifact = workspace.result("report")
    for name in artifact.manifest.files:
        workspace.storage.put(f"{workspace.home}/{name}", artifact.read(name))
    return f"{workspace.storage.uri}/{workspace.home}/report.html"


def _delivered(recorder: Recorder, place: Place, progress: Progress) -> dict[str, Any]:
    status = recorder.delivered()
    if status["pending"]:
        progress.say(
            f"warning: MLflow at {place.tracking_uri} has not taken {status['pending']} events "
            f"({status['last_error']}); they are kept, `mixflow replay` sends them later"
        )
    return {"uri": place.tracking_uri, "parent_run": status["run_id"], "pending": status["pending"]}
