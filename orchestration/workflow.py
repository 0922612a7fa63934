"""The stages of an experiment, their identities, and where each one stands.

A stage's identity is its settings and its inputs' content hashes; its result is a published directory
`<kind>/<identity>/` of the workspace, which exists when its manifest does. Running again therefore resumes: what is
there is skipped, whatever was killed and whoever made it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mixflow_core.samplers import Sampler
from orchestration.experiment import SEARCH_PAIR, Experiment
from orchestration.lease import Lease, hold
from orchestration.parts import Parts, parts_of
from orchestration.storage import Storage, join, open_storage
from workers.manifest import MANIFEST, CorruptError, Manifest, canonical_hash

log = logging.getLogger(__name__)
PATHS_OF_ENCODERS = {"features", "text_encoders", "max_unreadable"}
PATHS_OF_CODEC = ("weights", "decoder", "statistics")  # where its files lie does not change what it computes


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
        name: unique in the experiment, `<kind>`, `base/<number>` where there are several, `<kind>/<arm>/<pair>`, or
            `trials/<arm>`.
        settings: plain JSON; with the inputs' content it decides the result.
        inputs: names of the stages whose results it reads.
        on_driver: needs no worker.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    on_driver: bool = False

    @property
    def kind(self) -> str:
        """What it does: data, base, guide, features, reference, slow-flow, arms, trials, samples, metrics or report."""
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Artifact:
    """The result of a stage: a published directory."""

    storage: Storage
    path: str
    manifest: Manifest

    @property
    def full_uri(self) -> str:
        """URI of the directory."""
        return join(self.storage.uri, self.path)

    @property
    def device_s(self) -> float:
        """Seconds that devices (GPUs, or workers' CPUs) were kept for it: of the attempt that finished, times workers.

        0 for what was given and not made.
        """
        meta = self.manifest.meta
        return float(meta.get("seconds", 0)) * int(meta.get("num_workers", 1))

    def read(self, name: str) -> bytes:
        """One file of it, verified.

        Raises:
            CorruptError: the file is missing or not what the manifest says.
        """
        try:
            content = self.storage.read(join(self.path, name))
        except FileNotFoundError as error:
            raise CorruptError(self.full_uri, name, "is missing") from error
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise CorruptError(self.full_uri, name, "has another SHA-256 than its manifest says")
        return content

    def fetch(self, cache: Path) -> Path:
        """A verified local copy (the directory itself where it is local)."""
        return self.storage.fetch(self.path, cache / self.manifest.digest[:16])


def stages_of(experiment: Experiment) -> list[Stage]:
    """All stages of an experiment in an order that respects their inputs."""
    e = experiment
    codec = {"codec": e.codec.description} if e.codec else {}
    kinds = [extractor.kind for extractor in e.evaluation.extractors]
    stages = [
        # Encoders are told apart by their hashes, wherever they lie.
        Stage(
            "data",
            {**e.data.model_dump(mode="json", exclude_none=True, exclude={"images": PATHS_OF_ENCODERS}), **codec},
            on_driver=True,
        ),
        *(_base_stage(e, base) for base in range(e.bases)),
        *([Stage("guide", e.guide.model_dump(mode="json", exclude={"checkpoint"}), on_driver=True)] if e.guide else []),
        Stage(
            "features",
            {"num_classes": e.model.num_classes, "path": e.path, "classifier": "digits" in kinds},
            ("data",),
        ),
        Stage(
            "reference",
            {
                "extractors": _hashes(e),
                "reference": e.evaluation.reference.model_dump(mode="json", exclude={"npz"}),
            },
            ("data", "features"),
        ),
    ]
    trained = [name for name, arm in e.arms.items() if arm.train]
    stages.append(_slow_flow_stage(e, "base", (e.base_stage(),)))
    for pair in range(e.num_pairs):
        for arm in trained:
            run = e.arm_run(arm, pair).model_dump(mode="json")
            stages.append(Stage(f"arms/{arm}/{pair}", {"run": run}, ("data", e.base_stage(e.base_of(pair)))))
    stages += [_slow_flow_stage(e, arm, _weights_of(e, arm, 0)) for arm in trained]
    stages += [_sample_stage(e, arm, pair) for pair in range(e.num_pairs) for arm in e.arms]
    captioned = ("data",) if "clip" in kinds else ()
    for pair in range(e.num_pairs):
        for arm in e.arms:
            inputs = (f"samples/{arm}/{pair}", "features", "reference", *captioned)
            # The label law decides how images are resampled for their variation within a seed.
            settings = {"extractors": _hashes(e), "label_law": e.evaluation.label_law}
            stages.append(Stage(f"metrics/{arm}/{pair}", settings, inputs))
    reported = tuple(s.name for s in stages if s.kind in ("metrics", "slow-flow"))
    return [*stages, Stage("report", {"experiment": e.identity}, reported, on_driver=True)]


def _base_stage(e: Experiment, base: int) -> Stage:
    run = e.base_run(base)
    if run:
        return Stage(e.base_stage(base), {"run": run.model_dump(mode="json")}, ("data",))
    return Stage(e.base_stage(base), {"model": asdict(e.model), "sha256": e.base.sha256}, on_driver=True)


def _weights_of(e: Experiment, arm: str, pair: int) -> tuple[str, ...]:
    """The stages whose weights make the arm's network: adapters alone are no model."""
    base = e.base_stage(e.base_of(pair))
    if not e.arms[arm].train:
        return (base,)
    return (f"arms/{arm}/{pair}", base) if getattr(e.model, "lora_rank", 0) else (f"arms/{arm}/{pair}",)


def _sampled(e: Experiment) -> dict[str, Any]:
    """The run's settings as far as sampling reads them."""
    return e.sampling_run().model_dump(mode="json", exclude={"training", "mixture", "corrective", "seed"})


def _slow_flow_stage(e: Experiment, of: str, weights: tuple[str, ...]) -> Stage:
    settings = {
        "run": _sampled(e),
        "samplers": [asdict(sampler) for sampler in e.slow_flow_samplers],
        "num_samples": e.evaluation.slow_flow_samples,
        "batch_size": e.evaluation.sample_batch_size,
        "seed": e.sampling_seed(0),
    }
    beside = ("guide",) if any(map(_needs_guide, e.slow_flow_samplers)) else ()
    return Stage(f"slow-flow/{of}", settings, ("data", "features", *weights, *beside))


def _needs_guide(sampler: Sampler) -> bool:
    return sampler.guidance == "autoguidance" and sampler.guidance_scale != 1


def _sample_stage(e: Experiment, arm: str, pair: int) -> Stage:
    cells, evaluation = e.evaluation.cells_of(e.base_of(pair)), e.evaluation
    settings = {
        "run": _sampled(e),
        "samplers": [asdict(sampler) for sampler in cells],
        "num_samples": evaluation.num_samples,
        "batch_size": evaluation.sample_batch_size,
        "label_law": evaluation.label_law,
        "corrective": asdict(e.arms[arm].sampling),
        "seed": e.sampling_seed(pair),
        **({"codec": {**asdict(e.codec), **dict.fromkeys(PATHS_OF_CODEC)}} if e.codec else {}),
    }
    guided = any(map(_needs_guide, cells))
    # Captions and their embeddings lie beside the images.
    beside = (*(["guide"] if guided else []), *(["data"] if e.model.family == "sd3" else []))
    return Stage(f"samples/{arm}/{pair}", settings, (*_weights_of(e, arm, pair), *beside))


def trial_stage(e: Experiment, arm: str) -> Stage:
    """A trial of a sweep: the arm's training with the search's seeds, and the objective on fixed noise on the way.

    An experiment with the parameters that it found is therefore no repetition of it.
    """
    assert e.sweep, "only a sweep has trials"
    metric, _, cell = e.objective.partition("/")
    sampling = _sample_stage(e, arm, 0).settings
    sampler = next(sampler for sampler in e.evaluation.samplers if sampler.name == cell)
    samples = {
        **{key: value for key, value in sampling.items() if key != "run"},
        "samplers": [asdict(sampler)],
        "num_samples": e.sweep.num_samples or e.evaluation.num_samples,
        "seed": e.sampling_seed(SEARCH_PAIR),
    }
    run = e.arm_run(arm, 0).model_copy(update={"seed": e.training_seed(SEARCH_PAIR)})
    return Stage(
        f"trials/{arm}",
        {
            "run": run.model_dump(mode="json"),
            "metric": metric,
            "every": e.sweep.evaluate_every or e.training.checkpoint_every,
            "samples": samples,
            "extractors": _hashes(e),
        },
        ("data", e.base_stage(), "features", "reference", *(["guide"] if _needs_guide(sampler) else [])),
    )


def _hashes(e: Experiment) -> list[dict[str, str]]:
    """The extractors, wherever their weights lie."""
    return [{"kind": extractor.kind, "sha256": extractor.sha256} for extractor in e.evaluation.extractors]


def needed_for(stages: list[Stage], targets: Callable[[Stage], bool]) -> list[Stage]:
    """The stages that are targets and everything they read, in order."""
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()

    def add(name: str) -> None:
        if name not in wanted:
            wanted.add(name)
            for other in by_name[name].inputs:
                add(other)

    for stage in stages:
        if targets(stage):
            add(stage.name)
    return [stage for stage in stages if stage.name in wanted]


class Workspace:
    """Where each stage of an experiment stands in a storage.

    Args:
        experiment: whose stages they are.
        storage: where they are kept.
        trial: the arm that is a trial of a sweep, "" for none: then there is a stage for it.
    """

    def __init__(self, experiment: Experiment, storage: Storage, trial: str = "") -> None:
        self.experiment, self.storage, self.trial = experiment, storage, trial
        trials = [trial_stage(experiment, trial)] if trial else []
        self.stages = {stage.name: stage for stage in [*stages_of(experiment), *trials]}
        self._found: dict[str, Artifact] = {}

    @property
    def home(self) -> str:
        """Directory of what belongs to this experiment alone: its record, lease, spool and report."""
        return f"experiments/{self.experiment.name}-{self.experiment.identity}"

    def identity(self, name: str) -> str | None:
        """Identity of a stage, None while an input is not there."""
        stage = self.stages[name]
        inputs = {}
        for other in stage.inputs:
            artifact = self.artifact(other)
            if artifact is None:
                return None
            inputs[other.split("/")[0]] = artifact.manifest.digest
        if stage.kind == "report":  # reads many results of one kind
            inputs = {other: self._found[other].manifest.digest for other in stage.inputs}
        return canonical_hash({"kind": stage.kind, "settings": stage.settings, "inputs": inputs})[:16]

    def path(self, name: str) -> str:
        """Directory of a stage's result, whose inputs must be there."""
        identity = self.identity(name)
        if identity is None:
            raise RuntimeError(f"{name} was asked for before its inputs were there")
        return f"{self.stages[name].kind}/{identity}"

    def checkpoints(self, name: str) -> str:
        """Directory of a training stage's checkpoints."""
        return f"checkpoints/{self.path(name).replace('/', '-')}"

    def artifact(self, name: str) -> Artifact | None:
        """The result of a stage, None if it is still to do."""
        if name not in self._found:
            shards = self.experiment.data.shards
            if name == "data" and shards:
                storage, path = open_storage(shards), ""
            elif (identity := self.identity(name)) is None:
                return None
            else:
                storage, path = self.storage, f"{self.stages[name].kind}/{identity}"
            manifest = storage.manifest(path)
            if manifest is None:
                return None
            self._found[name] = Artifact(storage, path, manifest)
        return self._found[name]

    def result(self, name: str) -> Artifact:
        """The result of a stage that is there."""
        artifact = self.artifact(name)
        if artifact is None:
            raise RuntimeError(f"{name} was asked for before it was done")
        return artifact

    def state(self, name: str) -> str:
        """`done`, `stale` (done, by another version of the code) or `to do`."""
        artifact = self.artifact(name)
        if artifact is None:
            return "to do"
        return "done" if artifact.manifest.meta.get("code", code_version()) == code_version() else "stale"

    def pending(self, stages: list[Stage]) -> list[Stage]:
        """Those still to do."""
        return [stage for stage in stages if self.artifact(stage.name) is None]

    def standing(self, stages: list[Stage]) -> tuple[str, str, int] | None:
        """Where workers that start now go on: the stage, its newest checkpoint, its parts; None if all is done."""
        pending = self.pending(stages)
        if not pending:
            return None
        name = pending[0].name
        kept = [path for path in self.storage.list(self.checkpoints(name)) if path.endswith(f"/{MANIFEST}")]
        return name, max(kept, default=""), len(self.storage.list(self.parts(name).records))

    def parts(self, name: str) -> Parts:
        """The directory of a stage whose workers write its files one by one."""
        return parts_of(self.storage, self.path(name))

    def publish(
        self, name: str, directory: Path, *, seconds: float, parts: Mapping[str, Any] | None = None, **about: Any
    ) -> Artifact:
        """Commits a stage's result; of two racing runners one wins and both go on with its result.

        Args:
            name: of the stage.
            directory: its files.
            seconds: that it took.
            parts: records of the files that its workers have put in their place already.
            about: more for the manifest's meta.
        """
        path = self.path(name)
        meta = {"stage": name, "code": code_version(), "seconds": seconds, **about}
        try:
            if parts is None:
                manifest = self.storage.publish(directory, path, meta)
            else:
                manifest = self.parts(name).commit(parts, directory, meta)
        except FileExistsError:
            found = self.storage.manifest(path)
            if found is None:
                raise
            manifest = found
        self._found[name] = Artifact(self.storage, path, manifest)
        return self._found[name]

    def forget(self, names: Sequence[str]) -> None:
        """Removes results and checkpoints of stages, so that they are done anew.

        Args:
            names: of the stages, a stage after those that read it, since it is found by its inputs.

        Raises:
            HeldError: another process is at one of them; nothing was removed.
        """
        names = [name for name in names if self.identity(name) and not (name == "data" and self.experiment.data.shards)]
        with ExitStack() as leases:
            for name in {self.path(name): name for name in names}.values():  # equal arms share a result
                leases.enter_context(self.lease(name))
            for name in names:
                for path in (self.path(name), self.checkpoints(name), self.parts(name).records):
                    self.storage.delete(path)
        self._found.clear()

    def lease(self, stage: str | None = None) -> AbstractContextManager[Lease]:
        """Keeps a second runner away from this experiment, or from a stage that experiments share; see `hold`."""
        if stage is None:
            return hold(self.storage, f"{self.home}/lease.json", f"experiment {self.experiment.name}", wait=True)
        return hold(self.storage, f"leases/{self.path(stage).replace('/', '-')}.json", f"stage {stage}")


@lru_cache
def code_version() -> str:
    """Hash of the sources that decide results: the method and the workers."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("mixflow_core/**/*.py"), *root.glob("workers/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
