"""The sections of an experiment file, each checked by itself; `experiment` checks how they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mixflow_core.correctives import SamplingCorrective, TrainingCorrective
from mixflow_core.mixture import SlowedMixture
from mixflow_core.samplers import Sampler
from orchestration.space import Law, Search, grid_size, is_finite, parse_space, search_of
from workers.config import Frozen, Training
from workers.data import Split
from workers.encode import Images
from workers.evaluate import PUBLISHED, metrics_of
from workers.extractors import ExtractorConfig
from workers.models.family import ModelConfig
from workers.sample import LabelLaw

STANDARD = SlowedMixture(time_law="uniform", slowing_law="interval", gamma=0.0, target_time="m")


class Digits(Frozen):
    """scikit-learn's handwritten digits: 1,797 real images of 10 classes.

    Attributes:
        image_size: side in pixels, 8 as they are or a larger power of two (enlarged, bicubic).
        held_out: images kept out of training.
    """

    image_size: Literal[8, 16, 32, 64] = 8
    held_out: int = Field(default=597, ge=100, le=1500)


class Data(Frozen):
    """Where the images come from.

    Attributes:
        digits: scikit-learn's handwritten digits, as pixels.
        shards: the URI of a directory in this project's format, pixels or latents.
        images: a folder, WebDataset or Parquet of images, to be encoded by the experiment's codec.
    """

    digits: Digits | None = None
    shards: str | None = None
    images: Images | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(given is not None for given in (self.digits, self.shards, self.images)) != 1:
            raise ValueError(
                "data must give exactly one of 'digits', 'shards' and 'images'; add one, or set another to null"
            )
        return self


class Base(Frozen):
    """The model that is post-trained: given by `checkpoint` (a URI, with its `sha256`), or trained here by `train`.

    Attributes:
        mixture: the times it was trained with, m = t: the standard arm goes on with them.
    """

    checkpoint: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    train: Training | None = None
    mixture: SlowedMixture = STANDARD

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.checkpoint is None) == (self.train is None):
            raise ValueError("base must give exactly one of 'checkpoint' and 'train'; add one, or set one to null")
        if (self.checkpoint is None) != (self.sha256 is None):
            raise ValueError("base must give 'checkpoint' and 'sha256' together; sha256sum FILE prints it")
        if self.mixture.gamma or self.mixture.slowing_law != "interval":
            raise ValueError("base.mixture must be standard interpolation, m = t; set its gamma to 0")
        return self


class Guide(Frozen):
    """The weaker model of autoguidance: a checkpoint (URI and SHA-256) of its own shape."""

    model: ModelConfig
    checkpoint: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Arm(Frozen):
    """One way to go on from the base.

    Attributes:
        train: false for the base itself, without post-training.
        mixture: what differs from the experiment's mixture.
        corrective: other remedies for exposure bias in the input of its training.
        sampling: other remedies in its sampling; arms that differ in nothing else share their training.
        judged: whether it gets a verdict, for which a slowed arm needs its matched control beside it. An arm that is
            not judged, a point of a sweep or of a table, is shown with its intervals alone.
    """

    train: bool = True
    mixture: Mapping[str, Any] = {}
    corrective: TrainingCorrective = TrainingCorrective()
    sampling: SamplingCorrective = SamplingCorrective()
    judged: bool = True

    @model_validator(mode="after")
    def _used(self) -> Self:
        if not self.train and (self.mixture or not self.corrective.is_off):
            raise ValueError("mixture and corrective must be left out where train is false; remove them")
        return self


class Reference(Frozen):
    """What samples are compared with.

    Attributes:
        split: images of the data, `held_out` or `train`, whose pixels were kept.
        npz: URI of a reference of ADM's evaluator: the FID-Inception's statistics, and images for the other metrics.
        sha256: of that file.
    """

    split: Split | None = None
    npz: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.split is None) == (self.npz is None):
            raise ValueError("reference must give exactly one of 'split' and 'npz'; remove or add one")
        if (self.npz is None) != (self.sha256 is None):
            raise ValueError("reference must give 'npz' and 'sha256' together; sha256sum FILE prints it")
        return self


class Claim(Frozen):
    """What a publication says of two arms, to be set beside what is found here in every cell.

    Attributes:
        arm, control: names of the arms.
        expected: of `arm` against `control`: `better`, `worse`, or `equal`, which is found where the interval of the
            difference lies within `effect` of the control's mean.
        published: the publication's own numbers and what they are of.
    """

    arm: str
    control: str
    expected: Literal["better", "worse", "equal"]
    published: str

    @model_validator(mode="after")
    def _of_two(self) -> Self:
        if self.arm == self.control:
            raise ValueError(f"control must be another arm than arm, got {self.control!r} for both; correct one")
        return self


class Evaluation(Frozen):
    """How the arms are compared.

    Attributes:
        samplers: the cells, each one way to sample.
        first_base_only: cells, by name, that are sampled from the first of several bases alone, because they are dear.
        num_samples: images of each cell, arm and replicate.
        sample_batch_size: images of one network call, part of the protocol.
        label_law: `equal` or `random` labels of the samples, see LABEL_LAWS.
        extractors: networks in whose features images are compared.
        reference: what samples are compared with.
        primary: the declared cell of the verdict, `<metric>/<sampler><steps>/s<scale>`.
        effect: the relative difference that is asked about, for the number of pairs needed to see it.
        recall_margin: how far recall may fall below a control's before an arm cannot be promoted.
        slow_flow_samples: pairs of noise and image of the Slow Flow measurement.
        slow_flow_samplers: by which it generates states; none for Euler of 20 steps and an SDE of 8, over the times at
            which the model's prediction is defined.
    """

    samplers: tuple[Sampler, ...] = Field(min_length=1)
    first_base_only: tuple[str, ...] = ()
    num_samples: int = Field(default=2000, ge=100, le=10_000_000)
    sample_batch_size: int = Field(default=250, ge=1, le=100_000)
    label_law: LabelLaw = "equal"
    extractors: tuple[ExtractorConfig, ...] = Field(default=(ExtractorConfig("digits"),), min_length=1)
    reference: Reference = Reference(split="held_out")
    primary: str
    effect: float = Field(default=0.05, gt=0, lt=1)
    recall_margin: float = Field(default=0.02, ge=0, le=1)
    slow_flow_samples: int = Field(default=250, ge=10, le=1_000_000)
    slow_flow_samplers: tuple[Sampler, ...] = ()

    @model_validator(mode="after")
    def _declared(self) -> Self:
        cells = [sampler.name for sampler in self.samplers]
        for key, names in (("samplers", cells), ("slow_flow_samplers", [s.name for s in self.slow_flow_samplers])):
            if len(set(names)) < len(names):
                raise ValueError(f"{key} must differ from one another, got {names}; remove the repeated one")
        metric, _, cell = self.primary.partition("/")
        if metric not in self.metrics or cell not in cells:
            hint = ""
            if metric.startswith("sfid_"):
                hint = "; of the extractors inception alone gives spatial features: add it and ask for sfid"
            elif metric in set(PUBLISHED.values()) - set(self.metrics):
                hint = "; add the extractor inception"
            raise ValueError(
                f"primary must be one of the metrics {self.metrics} and one of the cells {cells} joined by '/', "
                f"got {self.primary!r}{hint}"
            )
        unknown = [name for name in self.first_base_only if name not in cells or name == cell]
        if unknown:
            raise ValueError(f"first_base_only must name cells, not the primary one, of {cells}, got {unknown[0]!r}")
        kinds = [extractor.kind for extractor in self.extractors]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"extractors must be of different kinds, got {kinds}; remove the repeated one")
        if self.reference.npz and kinds != ["inception"] and "digits" in kinds:
            raise ValueError("extractors must not have digits where reference is an npz of other images; remove it")
        return self

    @property
    def metrics(self) -> list[str]:
        """All that is measured of a cell."""
        return metrics_of([extractor.kind for extractor in self.extractors])

    def cells_of(self, base: int) -> tuple[Sampler, ...]:
        """The cells that are sampled from this base's arms."""
        return tuple(s for s in self.samplers if base == 0 or s.name not in self.first_base_only)


class Sweep(Frozen):
    """A search over keys of the run: trials beside the two controls, from one base, on one order of data and noise.

    Attributes:
        space: dotted key of `mixture`, `training` or `corrective` -> `uniform(a,b)`, `loguniform(a,b)`, `randint(a,b)`,
            `choice(a,b,...)` or `grid(a,b,...)`.
        search: `random`, `grid` or `optuna` (TPE); the grid where the space has grids, else random.
        scheduler: `fifo`, every trial to its end, or `asha`, which stops trials whose objective lags behind.
        num_trials: in all, besides the controls; 8, or the whole grid; fewer where the space has fewer points. A sweep
            that is done goes on when it is raised.
        objective: `<metric>/<sampler><steps>/s<scale>`, measured of the averaged weights; `evaluation.primary` if not
            given.
        num_samples: images that it is measured with, from fixed noise; those of `evaluation` if not given.
        evaluate_every: steps between its values, a multiple of training.checkpoint_every, which it is if not given. It
            is always measured at the end.
        grace_steps: with asha, steps that no trial is stopped before; evaluate_every if not given.
        reduction_factor: of asha, which lets one of so many go on.
    """

    space: Mapping[str, str] = {}
    search: Search | None = None
    scheduler: Literal["fifo", "asha"] = "fifo"
    num_trials: int | None = Field(default=None, ge=1, le=100_000)
    objective: str | None = None
    num_samples: int | None = Field(default=None, ge=100, le=10_000_000)
    evaluate_every: int | None = Field(default=None, ge=1)
    grace_steps: int | None = Field(default=None, ge=1)
    reduction_factor: int = Field(default=3, ge=2, le=100)

    @field_validator("scheduler", mode="before")
    @classmethod
    def _no_pbt(cls, scheduler: Any) -> Any:
        if str(scheduler).lower() in ("pbt", "population", "population_based"):
            raise ValueError(
                f"scheduler must be fifo or asha, got {scheduler!r}; Ray Tune's population based training does nothing "
                "for trials that are Ray Train runs, which hand Tune no checkpoint"
            )
        return scheduler

    @model_validator(mode="after")
    def _fits(self) -> Self:
        search_of(self.laws, self.search)
        return self

    @property
    def laws(self) -> dict[str, Law]:
        """The space, read."""
        return parse_space(self.space)

    @property
    def resolved_search(self) -> Search:
        """The search that is meant."""
        return search_of(self.laws, self.search)

    @property
    def most_trials(self) -> int:
        """Trials in all, besides the controls, where none was run that the present space does not have."""
        points = grid_size(self.laws) if is_finite(self.laws) else None
        wanted = self.num_trials or (points if self.resolved_search == "grid" else None) or 8
        return min(wanted, points or wanted)


Positive = Annotated[int, Field(ge=1)]


class Cluster(Frozen):
    """What a run asks of Ray.

    Attributes:
        num_workers: workers of one group, which serves all arms and seeds in turn; at most training.num_shards. As
            `[least, most]` the group is elastic: it goes on with fewer where a node is lost and grows where one comes
            (trials of a sweep that are at work beside others do not).
        cpus_per_worker: CPUs of a worker, and its torch threads.
        gpus_per_worker: 1 to compute on GPUs, 0 on CPUs.
        max_failures: restarts of the worker group before the run fails, counted anew once a later checkpoint, part or
            stage is kept; 0 for none ever.
        hang_timeout_s: seconds without a sign of life after which a worker is taken for hung: its stack is logged, it
            is killed, and the group starts again. A worker that computes gives such signs whatever it computes.
    """

    num_workers: Positive | tuple[Positive, Positive] = 1
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: Literal[0, 1] = 0
    max_failures: int = Field(default=2, ge=0)
    hang_timeout_s: float = Field(default=300.0, ge=5)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.least_workers > self.most_workers:
            raise ValueError(
                f"num_workers must be [least, most], got [{self.least_workers}, {self.most_workers}]; turn them round"
            )
        return self

    @property
    def least_workers(self) -> int:
        """Workers without which a group does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Workers of a group that has all it asks for."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
