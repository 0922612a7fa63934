"""The experiment file: what is compared with what, on which data and cluster; validated once, on the driver."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from mixflow_core.mixture import SlowedMixture
from mixflow_core.samplers import Sampler
from workers.config import Frozen, RunConfig, Training
from workers.evaluate import METRICS
from workers.manifest import canonical_hash
from workers.models.sit import SiTConfig

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
    """Where the images come from: either `digits`, or `shards`, the URI of a directory in this project's format."""

    digits: Digits | None = None
    shards: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.digits is None) == (self.shards is None):
            raise ValueError("data must give exactly one of 'digits' and 'shards'; remove or add one")
        return self


class Base(Frozen):
    """The model that is post-trained: given by `checkpoint` (a URI, with its `sha256`), or trained here by `train`."""

    checkpoint: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    train: Training | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.checkpoint is None) == (self.train is None):
            raise ValueError("base must give exactly one of 'checkpoint' and 'train'; remove or add one")
        if (self.checkpoint is None) != (self.sha256 is None):
            raise ValueError("base must give 'checkpoint' and 'sha256' together; sha256sum FILE prints it")
        return self


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
    num_samples: int = Field(default=2000, ge=100)
    sample_batch_size: int = Field(default=250, ge=1)
    primary: str
    recall_margin: float = Field(default=0.02, ge=0, le=1)
    slow_flow_samples: int = Field(default=500, ge=10)

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
        model, path: of the base, and so of every arm.
        training: of every arm.
        mixture: the slowed interpolation mixture under test.
        arms: name -> arm; each slowed arm needs its controls beside it: standard training and its matched marginal.
        replicates: training seeds an arm; replicate k shares data order, noise and sampling seed across the arms.
    """

    name: str = Field(pattern=NAME)
    seed: int = Field(default=0, ge=0)
    data: Data
    model: SiTConfig
    path: Literal["linear", "gvp"] = "linear"  # VP has no velocity at t = 1, which the time laws reach
    base: Base
    training: Training
    mixture: SlowedMixture
    arms: Mapping[str, Arm]
    replicates: int = Field(default=3, ge=2, le=1000)
    evaluation: Evaluation
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        digits = self.data.digits
        if digits and (self.model.input_size, self.model.in_channels) != (digits.image_size, 1):
            raise ValueError(
                f"model.input_size must be data.digits.image_size {digits.image_size} with in_channels 1, "
                f"got {self.model.input_size} with {self.model.in_channels}"
            )
        if digits and self.model.num_classes != 10:
            raise ValueError(f"model.num_classes must be 10 for the digits, got {self.model.num_classes}")
        for where, training in (("training", self.training), ("base.train", self.base.train)):
            if training and self.cluster.num_workers > training.num_shards:
                raise ValueError(
                    f"cluster.num_workers must be at most {where}.num_shards {training.num_shards}, "
                    f"got {self.cluster.num_workers}; raise num_shards"
                )
        if self.model.null_label is None and any(s.guidance_scale != 1 for s in self.evaluation.samplers):
            raise ValueError("evaluation.samplers must have guidance_scale 1 for a model with class_dropout_prob 0")
        self._check_arms()
        return self

    def _check_arms(self) -> None:
        for name in self.arms:
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"arms must have names of letters, digits, '_', '.' and '-', got {name!r}; rename it, "
                    "because it becomes part of paths"
                )
        mixtures = {name: self.mixture_of(name) for name, arm in self.arms.items() if arm.train}
        if STANDARD not in mixtures.values():
            raise ValueError(
                "arms must include standard training {mixture: {time_law: uniform, slowing_law: interval, gamma: 0, "
                "target_time: m, condition_on: t, shift: 1}}; add it as 'standard'"
            )
        for name, mixture in mixtures.items():
            if not mixture.is_standard and replace(mixture, condition_on="m") not in mixtures.values():
                raise ValueError(
                    f"arms must include the matched-marginal control of {name!r}; "
                    f"add {{mixture: {{condition_on: m}}}} beside its own settings"
                )

    def mixture_of(self, arm: str) -> SlowedMixture:
        """The mixture that an arm trains on."""
        merged = {**asdict(self.mixture), **self.arms[arm].mixture}
        try:
            mixture = TypeAdapter(SlowedMixture).validate_json(json.dumps(merged))
        except ValidationError as error:
            raise ValueError(f"arms.{arm}.mixture: {_one_line(error, SlowedMixture)}") from error
        if mixture.slowing_law == "interval" and mixture.gamma == 0:
            # With m = t the target's time and the told time say nothing: one form for one law.
            return replace(mixture, condition_on="t", target_time="m")
        return mixture

    def controls_of(self, arm: str) -> list[str]:
        """The arms that `arm` is judged against: standard training, and the matched marginal of what is slowed."""
        names = [name for name, a in self.arms.items() if a.train and self.mixture_of(name) == STANDARD][:1]
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
        return self._run(STANDARD, self.base.train, derived_seed(self.seed, "base", 0))

    def arm_run(self, arm: str, replicate: int) -> RunConfig:
        """One run of an arm; data order, times, noise and dropout depend on the replicate alone."""
        return self._run(self.mixture_of(arm), self.training, derived_seed(self.seed, "training", replicate))

    def sampling_run(self) -> RunConfig:
        """The run configuration as far as sampling reads it, which is the same for all arms."""
        return self._run(STANDARD, self.training, 0)

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
            mixture=mixture,
            training=training,
            seed=seed,
        )


def derived_seed(seed: int, use: str, number: int) -> int:
    """A seed keyed by what it is for: sums would make (0, 1) and (1, 0) the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{use}/{number}".encode()).digest()[:6], "little")


# --------------------------------------------------------------------------------------------------- loading


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everybody expects, and in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See yaml.SafeLoader."""
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if isinstance(key, str) and keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def recipes() -> list[str]:
    """Names of the recipes that come with the project."""
    folder = resources.files("orchestration.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from a recipe's name or a YAML file, with `dotted.key=value` overrides.

    Raises:
        ValueError: one line naming what is wrong, where, and the mend.
    """
    raw = _read(name)
    for override in overrides:
        _apply(raw, override)
    for section, key in (("data", "shards"), ("base", "checkpoint")):
        _make_absolute(raw.get(section), key)
    try:
        # Through JSON: in its strict mode arrays may become tuples and objects dataclasses, and nothing else is bent.
        return Experiment.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ValueError(f"{name}: {_one_line(error)}") from error
    except TypeError as error:
        raise ValueError(f"{name}: values must be plain YAML numbers, strings, lists or maps; {error}") from error


def _make_absolute(section: Any, key: str) -> None:
    """A local path means the driver's directory, also where a worker reads it."""
    value = section.get(key) if isinstance(section, dict) else None
    if isinstance(value, str) and value and "://" not in value and not value.startswith("file:"):
        section[key] = str(Path(value).expanduser().absolute())


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"experiment file must exist, got {name!r}; correct the path")
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"experiment file must be readable text, got {name!r}; {error}") from error
    elif name in recipes():
        text = resources.files("orchestration.recipes").joinpath(f"{name}.yaml").read_text()
    else:
        raise ValueError(
            f"unknown recipe {name!r}{_nearest(name, recipes())}; available are {', '.join(recipes())}, or a .yaml file"
        )
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"experiment file must be YAML, got {name!r}; {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"experiment file must be a map of settings, got {type(raw).__name__} in {name!r}; correct it")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set must be dotted.key=value, got {override!r}")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key} must have a value that is YAML, got {text!r}") from error
    *parents, last = key.split(".")
    target: Any = raw
    for parent in parents:
        target = _step(target, parent, key)
    if isinstance(target, list):
        target[_index(target, last, key)] = value
    else:
        target[last] = value


def _step(target: Any, part: str, key: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, key)]
    inner = target.setdefault(part, {})
    if inner is None:
        inner = target[part] = {}
    if not isinstance(inner, dict | list):
        raise ValueError(f"--set {key}: {part} must be a section, got the value {inner!r}")
    return inner


def _index(target: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(target):
        raise ValueError(f"--set {key}: {part!r} must be a place in a list of {len(target)}, counted from 0")
    return int(part)


def _one_line(error: ValidationError, root: type = Experiment) -> str:
    """The first problem of a validation, in the words of this project."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    shown = f"a {type(value).__name__} of {len(value)}" if isinstance(value, list | dict) else repr(value)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where!r}{_nearest(str(problem['loc'][-1]), _known_keys(root, problem['loc'][:-1]))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where} must be given; add it"
    if problem["type"] == "value_error":
        section = ".".join(str(part) for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        return f"{section}.{text}" if section and not text.startswith(section) else text
    rule = _rule(problem["type"], problem["msg"], problem.get("ctx", {}))
    return f"{where} must {rule}, got {shown}; correct it"


def _rule(kind: str, message: str, limits: Mapping[str, Any]) -> str:
    """What pydantic asks for, to be read after "must"."""
    known = {
        "int_type": "be an integer",
        "int_parsing": "be an integer",
        "float_type": "be a number",
        "string_type": "be text",
        "bool_type": "be true or false",
        "finite_number": "be finite",
        "model_type": "be a map of settings",
        "dataclass_type": "be a map of settings",
        "mapping_type": "be a map of settings",
        "dict_type": "be a map of settings",
        "tuple_type": "be a list",
        "greater_than_equal": "be at least {ge}",
        "less_than_equal": "be at most {le}",
        "greater_than": "be greater than {gt}",
        "less_than": "be less than {lt}",
        "too_short": "be a list of at least {min_length}",
        "string_pattern_mismatch": "match {pattern}",
    }
    if kind in known:
        return known[kind].format(**limits)
    return message.removeprefix("Input should ").removeprefix("Value should ")


def _known_keys(section: Any, location: tuple[Any, ...]) -> list[str]:
    """The keys of the section at a location below `section`."""
    for part in location:
        fields = getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", {})
        if part in fields:
            annotation = getattr(fields[part], "annotation", None) or getattr(fields[part], "type", None)
            section = _section_class(annotation)
        elif section is None:
            return []
    fields = getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", {})
    return list(fields)


def _section_class(annotation: Any) -> Any:
    """The configuration class inside an annotation such as `Base | None` or `tuple[Sampler, ...]`."""
    if hasattr(annotation, "model_fields") or hasattr(annotation, "__dataclass_fields__"):
        return annotation
    inner = [_section_class(argument) for argument in getattr(annotation, "__args__", ())]
    return next((found for found in inner if found is not None), None)


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else (f"; known are {', '.join(known)}" if known else "")
