"""The experiment file: what is compared with what, on which data and cluster; validated once, on the driver."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from mixflow_core.correctives import SamplingCorrective, TrainingCorrective
from mixflow_core.interpolant import Interpolant, PathName
from mixflow_core.loss import Prediction, Weighting, times_defined
from mixflow_core.mixture import SlowedMixture
from mixflow_core.samplers import Sampler
from orchestration.sections import Arm, Base, Claim, Cluster, Data, Evaluation, Guide, Sweep
from orchestration.wording import NAME, one_line
from workers.codecs import CodecConfig
from workers.config import Frozen, RunConfig, Training
from workers.manifest import canonical_hash
from workers.models.family import ModelConfig
from workers.models.sd3 import SD3Config

LEAST_HELD_OUT = 100  # a covariance of 64 features needs more images than features

SEARCH_PAIR = -1  # whose seeds a sweep's trials have, and no run of an experiment


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
        bases: how many bases are trained; with several, intervals are over bases.
        replicates: training seeds an arm and base. Pair p, seed p mod replicates of base p // replicates, shares data
            order, noise and sampling seed across the arms.
        claims: what a publication says of these arms.
        sweep: a search over keys of the run, for `mixflow sweep` alone.
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
    bases: int = Field(default=1, ge=1, le=100)
    replicates: int = Field(default=3, ge=1, le=1000)
    claims: tuple[Claim, ...] = ()
    evaluation: Evaluation
    cluster: Cluster = Cluster()
    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._check_data()
        if self.num_pairs < 2:
            raise ValueError(
                f"replicates times bases must be at least 2 for an interval, got {self.num_pairs}; raise one"
            )
        if self.bases > 1 and self.base.checkpoint:
            raise ValueError(f"bases must be 1 for a given base.checkpoint, got {self.bases}; set it to 1")
        if self.weighting != "none" and self.prediction not in ("noise", "score"):
            raise ValueError(f"weighting must be none for {self.prediction} prediction, got {self.weighting}")
        for where, training in (("training", self.training), ("base.train", self.base.train)):
            if training and self.cluster.most_workers > training.num_shards:
                raise ValueError(
                    f"cluster.num_workers must be at most {where}.num_shards {training.num_shards}, "
                    f"got {self.cluster.most_workers}; raise num_shards"
                )
            counts = range(self.cluster.least_workers, self.cluster.most_workers + 1)
            uneven = [n for n in counts if training and training.num_shards % n]
            if training and training.sharded and uneven:
                raise ValueError(
                    f"cluster.num_workers must divide {where}.num_shards {training.num_shards} where training is "
                    f"sharded, got {uneven[0]}"
                )
        for extractor in self.evaluation.extractors:
            if extractor.kind == "clip" and not is_captioned(self.model):
                raise ValueError("evaluation.extractors must not have clip for class labels, which are no captions")
            if extractor.kind == "digits" and self.model.num_classes == 1:
                raise ValueError(
                    "evaluation.extractors must not have digits where model.num_classes is 1: a classifier of one "
                    "class learns no features; use dinov2 or inception"
                )
            if extractor.kind != "digits" and self.image_shape[0] != 3:
                raise ValueError(
                    f"evaluation.extractors must be digits for images of {self.image_shape[0]} channels, "
                    f"got {extractor.kind}, which sees colours"
                )
        self._check_samplers()
        self._check_arms()
        if self.sweep:
            self._check_sweep(self.sweep)
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
        if images and bool(images.text_encoders) != is_captioned(self.model):
            rule = "given" if is_captioned(self.model) else "left out"
            raise ValueError(
                f"data.images.text_encoders must be {rule} for model.family {self.model.family}, got the other; "
                "captions are for sd3, class labels for the others"
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
        for sampler in (*self.evaluation.samplers, *self.evaluation.slow_flow_samplers):
            end = sampler.end if not sampler.is_sde or sampler.last_step == "none" else 1 - sampler.last_step_size
            if sampler.start < lowest or end > highest:
                raise ValueError(
                    f"evaluation.samplers must stay in [{lowest:g}, {highest:g}] for {self.prediction} prediction on "
                    f"path {self.path}, got {sampler.name}; set its start and end"
                )
            if sampler.diffusion == "sbdm" and sampler.start == 0 and self.path != "vp":
                raise ValueError(
                    f"evaluation.samplers must start above 0 for diffusion sbdm on path {self.path}, where it is "
                    f"infinite at 0, got {sampler.name}; set its start"
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
        for name, arm in self.arms.items():
            for sampler in self.evaluation.samplers:
                try:
                    arm.sampling.wrap(lambda x, t: x, Interpolant(self.path), sampler)
                except ValueError as error:
                    raise ValueError(f"arms.{name}.sampling does not fit {sampler.name}: {error}") from error
        if self.guide:
            mine, guides = self.model, self.guide.model
            for name in ("in_channels", "input_size", "num_classes"):
                if (its := getattr(guides, name)) != (wanted := getattr(mine, name)):
                    raise ValueError(
                        f"guide.model.{name} must be the model's {wanted}, got {its}; set it, or leave guide out"
                    )

    def _check_arms(self) -> None:
        for name in self.arms:
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"arms must have names of letters, digits, '_', '.' and '-', got {name!r}; rename it, "
                    "because it becomes part of paths"
                )
        mixtures = {name: self.mixture_of(name) for name, arm in self.arms.items() if arm.train}
        ways = {name: self._way_of(name) for name in self.arms}
        if (self.standard, TrainingCorrective(), SamplingCorrective()) not in ways.values():
            law = json.dumps(asdict(self.standard)).replace('"', "")
            raise ValueError(f"arms must include standard training {{mixture: {law}}}; add it as 'standard'")
        for name, mixture in mixtures.items():
            if self.path == "vp" and mixture.interval[1] > 0.99999:
                raise ValueError(
                    f"arms.{name}.mixture.interval must end at 0.99999 or before on path vp, whose sigma has no "
                    f"derivative at 1, got {list(mixture.interval)}"
                )
            if self.weighting != "none" and not 0 < _lowest_target(mixture) < mixture.interval[1] < 1:
                raise ValueError(
                    f"arms.{name}.mixture must keep its target's time inside (0, 1) where weighting is "
                    f"{self.weighting}, which is infinite at the ends, got interval {list(mixture.interval)}, "
                    f"slowing_law {mixture.slowing_law} and gamma {mixture.gamma}; narrow interval, lower gamma"
                )
            if self.arms[name].judged and not mixture.is_standard and _matched(ways[name]) not in ways.values():
                raise ValueError(
                    f"arms must include the matched-marginal control of {name!r}; "
                    f"add {{mixture: {{condition_on: m}}}} beside its own settings, or set its judged to false"
                )
        for claim in self.claims:
            for name in (claim.arm, claim.control):
                if name not in self.arms:
                    raise ValueError(f"claims must name arms, {list(self.arms)}, got {name!r}; correct it")

    def _check_sweep(self, sweep: Sweep) -> None:
        metric, _, cell = self.objective.partition("/")
        cells = {sampler.name: sampler for sampler in self.evaluation.samplers}
        metrics = [name for name in self.evaluation.metrics if name != "clip_score"]
        if metric not in metrics or cell not in cells:
            raise ValueError(
                f"sweep.objective must be one of the metrics {metrics} and one of the cells {list(cells)} joined by "
                f"'/', got {self.objective!r}; name one of them"
            )
        if cell in self.evaluation.first_base_only:
            raise ValueError(
                f"sweep.objective must be of a cell that every base has, got {self.objective!r}, which "
                "evaluation.first_base_only names; name another, or take it out there"
            )
        if self.training.sharded and cells[cell].method == "dopri5":
            raise ValueError(
                f"sweep.objective must have a fixed number of steps where training is sharded, got {self.objective!r}"
            )
        every = sweep.evaluate_every
        if every and every % self.training.checkpoint_every:
            raise ValueError(
                f"sweep.evaluate_every must be a multiple of training.checkpoint_every "
                f"{self.training.checkpoint_every}, got {every}; change one of them"
            )

    @property
    def objective(self) -> str:
        """What trials of a sweep are judged by, `<metric>/<cell>`."""
        return (self.sweep.objective if self.sweep else None) or self.evaluation.primary

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
        """The arms that `arm` is compared with.

        Standard training; the matched marginal of what is slowed (of every slowed arm, for an arm that is not slowed
        itself); and for an arm with other remedies, those that lack its remedies in training or in sampling alone.
        """
        ways = {name: self._way_of(name) for name in self.arms}
        own, off = ways[arm], (TrainingCorrective(), SamplingCorrective())
        names = [name for name, way in ways.items() if way == (self.standard, *off)][:1]
        for lacking in ((*own[:2], SamplingCorrective()), (own[0], TrainingCorrective(), own[2])):
            names += [name for name, way in ways.items() if way != own and way == lacking][:1]
        slowed = own[0] is not None and not own[0].is_standard
        for name, way in ways.items():
            if way[0] is not None and way[0].condition_on == "m":
                is_mine = slowed and _matched(own) == way
                names += [name] * (is_mine or (not slowed and any(_matched(other) == way for other in ways.values())))
        return [name for name in dict.fromkeys(names) if name != arm]

    def _way_of(self, arm: str) -> _Way:
        """What an arm is: its mixture (None without training), and its correctives."""
        its = self.arms[arm]
        return self.mixture_of(arm) if its.train else None, its.corrective, its.sampling

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that are looked at: pixels, not latents."""
        if self.codec:
            return self.codec.channels, self.codec.image_size, self.codec.image_size
        return self.model.in_channels, self.model.input_size, self.model.input_size

    @property
    def is_autoguided(self) -> bool:
        """Whether a cell is sampled with the guide."""
        return any(s.guidance == "autoguidance" for s in self.evaluation.samplers)

    @property
    def num_pairs(self) -> int:
        """Runs of an arm, over all bases and seeds."""
        return self.bases * self.replicates

    def base_of(self, pair: int) -> int:
        """The base from which pair `pair` starts."""
        return pair // self.replicates

    def base_stage(self, base: int = 0) -> str:
        """Name of the stage that makes a base: `base`, or `base/<number>` where there are several."""
        return "base" if self.bases == 1 else f"base/{base}"

    def base_run(self, base: int = 0) -> RunConfig | None:
        """A base's own training: standard flow matching; None for a given checkpoint."""
        if self.base.train is None:
            return None
        return self._run(self.standard, self.base.train, derived_seed(self.seed, "base", base))

    def arm_run(self, arm: str, pair: int) -> RunConfig:
        """One run of an arm; data order, times, noise and dropout depend on the pair alone."""
        run = self._run(self.mixture_of(arm), self.training, self.training_seed(pair))
        return run.model_copy(update={"corrective": self.arms[arm].corrective})

    def sampling_run(self) -> RunConfig:
        """The run configuration as far as sampling reads it, which is the same for all arms."""
        return self._run(self.standard, self.training, 0)

    @property
    def slow_flow_samplers(self) -> tuple[Sampler, ...]:
        """The samplers of the Slow Flow measurement: those that are given, or the two that it has otherwise."""
        start, end = times_defined(self.path, self.prediction)
        ours = (
            Sampler("euler", 20, start=start, end=end),
            Sampler("sde", 8, start=start, end=0.96, last_step="none"),
        )
        return self.evaluation.slow_flow_samplers or ours

    def training_seed(self, pair: int) -> int:
        """Of a pair's training, the same in every arm."""
        return derived_seed(self.seed, "training", pair)

    def sampling_seed(self, pair: int) -> int:
        """Seed of the starting noise of a pair, the same in every arm."""
        return derived_seed(self.seed, "sampling", pair)

    @property
    def identity(self) -> str:
        """Hash of everything but the cluster, which does not change what is computed, and the sweep, beside it."""
        return canonical_hash(self.model_dump(mode="json", exclude={"cluster", "sweep"}))[:12]

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


def is_captioned(model: ModelConfig) -> bool:
    """Whether its labels are captions."""
    return isinstance(model, SD3Config)


def _lowest_target(mixture: SlowedMixture) -> float:
    """The lowest time of a target."""
    if mixture.target_time == "t":
        return mixture.interval[0]
    return 0.0 if mixture.slowing_law == "independent" else (1 - mixture.gamma) * mixture.interval[0]


_Way = tuple[SlowedMixture | None, TrainingCorrective, SamplingCorrective]


def _matched(way: _Way) -> _Way | None:
    """The matched-marginal control of a slowed way; None of one that is not slowed."""
    mixture, corrective, sampling = way
    if mixture is None or mixture.is_standard:
        return None
    return replace(mixture, condition_on="m"), corrective, sampling


def _one_form(mixture: SlowedMixture) -> SlowedMixture:
    """With m = t the target's time and the told time say nothing: one form for one law."""
    if mixture.slowing_law == "interval" and mixture.gamma == 0:
        return replace(mixture, condition_on="t", target_time="m", order="shift_then_slow")
    return mixture


def derived_seed(seed: int, use: str, number: int) -> int:
    """A seed keyed by what it is for: sums would make (0, 1) and (1, 0) the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{use}/{number}".encode()).digest()[:6], "little")
