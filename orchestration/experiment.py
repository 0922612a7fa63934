"""The experiment file: what is compared with what, on which data and cluster; validated once, on the driver."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from mixflow_core.interpolant import PathName
from mixflow_core.loss import Prediction, Weighting, times_defined
from mixflow_core.mixture import SlowedMixture
from mixflow_core.samplers import Sampler
from orchestration.wording import one_line
from workers.codecs import CodecConfig
from workers.config import Frozen, RunConfig, Training
from workers.encode import Images
from workers.evaluate import METRICS
from workers.manifest import canonical_hash
from workers.models.family import ModelConfig
from workers.models.sd3 import SD3Config

LEAST_HELD_OUT = 100  # a covariance of 64 features needs more images than features
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
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
            raise ValueError("data must give exactly one of 'digits', 'shards' and 'images'; remove or add one")
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
            raise ValueError("base must give exactly one of 'checkpoint' and 'train'; remove or add one")
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
    """

    train: bool = True
    mixture: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.mixture and not self.train:
            raise ValueError("mixture must be empty where train is false; remove it")
        return self


class Evaluation(Frozen):
    """How the arms are compared.

    Attributes:
        samplers: the cells, each one way to sample.
        num_samples: images of each cell, arm and replicate.
        sample_batch_size: images of one network call, part of the protocol.
        primary: the declared cell of the verdict, `<metric>/<sampler><steps>/s<scale>`.
        recall_margin: how far recall may fall below a control's before an arm cannot be promoted.
        slow_flow_samples: rollouts of the Slow Flow measurement.
    """

    samplers: tuple[Sampler, ...] = Field(min_length=1)
    num_samples: int = Field(default=2000, ge=100, le=10_000_000)
    sample_batch_size: int = Field(default=250, ge=1, le=100_000)
    primary: str
    recall_margin: float = Field(default=0.02, ge=0, le=1)
    slow_flow_samples: int = Field(default=500, ge=10, le=1_000_000)

    @model_validator(mode="after")
    def _declared(self) -> Self:
        cells = [sampler.name for sampler in self.samplers]
        if len(set(cells)) < len(cells):
            raise ValueError(f"samplers must differ from one another, got {cells}; remove the repeated one")
        metric, _, cell = self.primary.partition("/")
        if metric not in METRICS or cell not in cells:
            raise ValueError(
                f"primary must be one of the metrics {list(METRICS)} and one of the cells {cells} joined by '/', "
                f"got {self.primary!r}"
            )
        return self


class Cluster(Frozen):
    """What a run asks of Ray.

    Attributes:
        num_workers: workers of one group, which serves all arms and seeds in turn; at most training.num_shards.
        cpus_per_worker: CPUs of a worker, and its torch threads.
        gpus_per_worker: 1 to compute on GPUs, 0 on CPUs.
        max_failures: restarts of the worker group before the run fails.
    """

    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: Literal[0, 1] = 0
    max_failures: int = Field(default=2, ge=0)


class Experiment(Frozen):
    """A comparison, complete.

    Attributes:
        name: also the name of the MLflow experiment.
        seed: of everything; replicates derive theirs from it.
        model, path, prediction, weighting: of the base, and so of every arm.
        codec: between pixels and the latents that the model sees; None for a model of pixels.
        guide: what autoguidance guides away from; None without.
        alignment_weight: of REPA's alignment loss in every training; 0 is without it.
        training: of every arm.
        mixture: the slowed interpolation mixture under test.
        arms: name -> arm; each slowed arm needs its controls beside it: standard training and its matched marginal.
        replicates: training seeds an arm; replicate k shares data order, noise and sampling seed across the arms.
    """

    name: str = Field(pattern=NAME)
    seed: int = Field(default=0, ge=0)
    data: Data
    codec: CodecConfig | None = None
    model: ModelConfig
    path: PathName = "linear"
    prediction: Prediction = "velocity"
    weighting: Weighting = "none"
    base: Base
    guide: Guide | None = None
    alignment_weight: float = Field(default=0.0, ge=0)
    training: Training
    mixture: SlowedMixture
    arms: Mapping[str, Arm]
    replicates: int = Field(default=3, ge=2, le=1000)
    evaluation: Evaluation
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._check_data()
        for where, training in (("training", self.training), ("base.train", self.base.train)):
            if training and self.cluster.num_workers > training.num_shards:
                raise ValueError(
                    f"cluster.num_workers must be at most {where}.num_shards {training.num_shards}, "
                    f"got {self.cluster.num_workers}; raise num_shards"
                )
            if training and training.sharded and training.num_shards % self.cluster.num_workers:
                raise ValueError(
                    f"cluster.num_workers must divide {where}.num_shards {training.num_shards} where training is "
                    f"sharded, got {self.cluster.num_workers}"
                )
        self._check_samplers()
        self._check_arms()
        return self

    def _check_data(self) -> None:
        digits, is_lora = self.data.digits, isinstance(self.model, SD3Config) and self.model.lora_rank > 0
        if digits and (self.model.input_size, self.model.in_channels) != (digits.image_size, 1):
            raise ValueError(
                f"model.input_size must be data.digits.image_size {digits.image_size} with in_channels 1, "
                f"got {self.model.input_size} with {self.model.in_channels}"
            )
        if digits and self.model.num_classes != 10:
            raise ValueError(f"model.num_classes must be 10 for the digits, got {self.model.num_classes}")
        if digits and self.codec:
            raise ValueError("codec must be left out for data.digits, which are trained on as pixels")
        images = self.data.images
        if images and self.alignment_weight and not images.features:
            raise ValueError(
                "data.images.features must be given where alignment_weight is not 0; add it, or set that to 0"
            )
        if images and images.held_out < LEAST_HELD_OUT:
            raise ValueError(f"data.images.held_out must be at least {LEAST_HELD_OUT}, got {images.held_out}; raise it")
        if self.data.images and not self.codec:
            raise ValueError("codec must be given for data.images; {kind: identity, image_size: ...} keeps pixels")
        projectors = getattr(self.model, "projector_dims", ())
        if self.alignment_weight and len(projectors) != 1:
            raise ValueError(
                f"alignment_weight must be 0 for a model without exactly one projector, got {self.alignment_weight}; "
                "set model.projector_dims"
            )
        if is_lora and self.base.train:
            raise ValueError("model.lora_rank must be 0 for a base that is trained here; give base.checkpoint")

    def _check_samplers(self) -> None:
        lowest, highest = times_defined(self.path, self.prediction)
        for sampler in self.evaluation.samplers:
            end = sampler.end if not sampler.is_sde or sampler.last_step == "none" else 1 - sampler.last_step_size
            if sampler.start < lowest or end > highest:
                raise ValueError(
                    f"evaluation.samplers must stay in [{lowest:g}, {highest:g}] for {self.prediction} prediction on "
                    f"path {self.path}, got {sampler.name}; set its start and end"
                )
            if sampler.guidance_scale == 1:
                continue
            if sampler.guidance == "autoguidance" and self.guide is None:
                raise ValueError(f"guide must be given for {sampler.name}; add its model, checkpoint and sha256")
            if sampler.guidance == "classifier_free" and self.model.null_label is None:
                raise ValueError("evaluation.samplers must have guidance_scale 1 for a model with class_dropout_prob 0")
            if sampler.guidance_channels > self.model.in_channels:
                raise ValueError(
                    f"guidance_channels must be at most model.in_channels {self.model.in_channels}, "
                    f"got {sampler.guidance_channels}"
                )
        if self.guide:
            mine, guides = self.model, self.guide.model
            shape = (mine.in_channels, mine.input_size, mine.num_classes)
            if (guides.in_channels, guides.input_size, guides.num_classes) != shape:
                raise ValueError("guide.model must have the model's in_channels, input_size and num_classes")

    def _check_arms(self) -> None:
        for name in self.arms:
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"arms must have names of letters, digits, '_', '.' and '-', got {name!r}; rename it, "
                    "because it becomes part of paths"
                )
        mixtures = {name: self.mixture_of(name) for name, arm in self.arms.items() if arm.train}
        if self.standard not in mixtures.values():
            law = json.dumps(asdict(self.standard)).replace('"', "")
            raise ValueError(f"arms must include standard training {{mixture: {law}}}; add it as 'standard'")
        for name, mixture in mixtures.items():
            if self.path == "vp" and mixture.interval[1] > 0.99999:
                raise ValueError(
                    f"arms.{name}.mixture.interval must end at 0.99999 or before on path vp, whose sigma has no "
                    f"derivative at 1, got {list(mixture.interval)}"
                )
        for name, mixture in mixtures.items():
            if not mixture.is_standard and replace(mixture, condition_on="m") not in mixtures.values():
                raise ValueError(
                    f"arms must include the matched-marginal control of {name!r}; "
                    f"add {{mixture: {{condition_on: m}}}} beside its own settings"
                )

    @property
    def standard(self) -> SlowedMixture:
        """The law of the standard arm, which is the base's own."""
        return _one_form(self.base.mixture)

    def mixture_of(self, arm: str) -> SlowedMixture:
        """The mixture that an arm trains on."""
        merged = {**asdict(self.mixture), **self.arms[arm].mixture}
        try:
            mixture = TypeAdapter(SlowedMixture).validate_json(json.dumps(merged))
        except ValidationError as error:
            raise ValueError(f"arms.{arm}.mixture: {one_line(error, SlowedMixture)}") from error
        return _one_form(mixture)

    def controls_of(self, arm: str) -> list[str]:
        """The arms that `arm` is judged against: standard training, and the matched marginal of what is slowed."""
        names = [name for name, a in self.arms.items() if a.train and self.mixture_of(name) == self.standard][:1]
        slowed = {name: self.mixture_of(name) for name, a in self.arms.items() if a.train}
        own = slowed.get(arm)
        for name, mixture in slowed.items():
            if mixture.condition_on != "m":
                continue
            of = [n for n, m in slowed.items() if not m.is_standard and replace(m, condition_on="m") == mixture]
            if own is None or own.is_standard or arm in of:
                names.append(name)
        return [name for name in names if name != arm]

    def base_run(self) -> RunConfig | None:
        """The base's own training: standard flow matching; None for a given checkpoint."""
        if self.base.train is None:
            return None
        return self._run(self.standard, self.base.train, derived_seed(self.seed, "base", 0))

    def arm_run(self, arm: str, replicate: int) -> RunConfig:
        """One run of an arm; data order, times, noise and dropout depend on the replicate alone."""
        return self._run(self.mixture_of(arm), self.training, derived_seed(self.seed, "training", replicate))

    def sampling_run(self) -> RunConfig:
        """The run configuration as far as sampling reads it, which is the same for all arms."""
        return self._run(self.standard, self.training, 0)

    def sampling_seed(self, replicate: int) -> int:
        """Seed of the starting noise of a replicate, the same in every arm."""
        return derived_seed(self.seed, "sampling", replicate)

    @property
    def identity(self) -> str:
        """Hash of everything but the cluster, which does not change what is computed."""
        return canonical_hash(self.model_dump(mode="json", exclude={"cluster"}))[:12]

    def _run(self, mixture: SlowedMixture, training: Training, seed: int) -> RunConfig:
        return RunConfig(
            model=self.model,
            path=self.path,
            prediction=self.prediction,
            weighting=self.weighting,
            mixture=mixture,
            training=training,
            alignment_weight=self.alignment_weight,
            seed=seed,
        )


def _one_form(mixture: SlowedMixture) -> SlowedMixture:
    """With m = t the target's time and the told time say nothing: one form for one law."""
    if mixture.slowing_law == "interval" and mixture.gamma == 0:
        return replace(mixture, condition_on="t", target_time="m", order="shift_then_slow")
    return mixture


def derived_seed(seed: int, use: str, number: int) -> int:
    """A seed keyed by what it is for: sums would make (0, 1) and (1, 0) the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{use}/{number}".encode()).digest()[:6], "little")
