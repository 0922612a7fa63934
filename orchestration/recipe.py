"""Experiments from recipes and YAML files, with `--set` overrides."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestration.experiment import Experiment
from orchestration.wording import nearest, one_line

TO_BE_GIVEN = "TO-BE-GIVEN"  # stands in a recipe for a path or hash that only its user knows
ALIAS, ALIASED = "mixflow_gamma", "mixture.gamma"  # as other trainers call it
PATHS = (
    "data.shards", "data.images.source", "data.images.features", "data.images.text_encoders",
    "codec.weights", "codec.decoder", "codec.statistics", "base.checkpoint", "guide.checkpoint",
    "evaluation.extractors.weights", "evaluation.reference.npz",
)  # fmt: skip


# Far beyond what experiments need. A few lines of YAML can stand for more values than fit any memory.
MOST_BYTES, MOST_VALUES, DEEPEST = 2**18, 20_000, 30
# What PyYAML raises at values that are not what their tags say, such as `!!int ""`, besides its own errors.
_YAML_RAISES = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and 2026-01-01 a text, as everybody expects, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See yaml.SafeLoader."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def fetch_flow_collection_start(self, token: Any) -> None:
        """See yaml.SafeLoader, whose scanner takes long over open brackets."""
        if self.flow_level > DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """See yaml.SafeLoader: takes merged maps in, which can stand in one another many times."""
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "too much is merged by <<", node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def recipes() -> list[str]:
    """Names of the recipes that come with the project."""
    folder = resources.files("orchestration.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(name: str, overrides: Sequence[str] = (), spaces: Sequence[str] = ()) -> Experiment:
    """An experiment from a recipe's name or a YAML file, with `dotted.key=value` overrides.

    Args:
        name: of the recipe or file.
        overrides: `--set` arguments.
        spaces: `--space` arguments, `dotted.key=law(...)`, which come into or over `sweep.space`.

    Raises:
        ValueError: one line naming what is wrong, where, and the mend.
    """
    raw = read(name, overrides, spaces)
    missing = to_be_given(raw)
    if missing:
        raise ValueError(
            f"{name}: {missing[0]} must be given ({len(missing)} in all: {', '.join(missing)}); "
            f"add --set {missing[0]}=..."
        )
    return validated(name, raw)


def read(name: str, overrides: Sequence[str] = (), spaces: Sequence[str] = ()) -> dict[str, Any]:
    """The settings as they are written and overridden, not validated; see `load`.

    A file may name another as `extends`, whose sections it takes where it has none of its own, and under `scales` sets
    of overrides by name, of which `scale=<name>` chooses one; what is overridden beside it comes after. At the top of a
    file or overridden, `mixflow_gamma` is another name of mixture.gamma.
    """
    raw = _overridden(name, overrides)
    for _, section, key in _local_paths(raw):
        section[key] = str(Path(section[key]).expanduser().absolute())  # also where a worker reads it
    keys = [space.partition("=")[0] for space in spaces]
    for space, key in zip(spaces, keys, strict=True):
        if keys.count(key) > 1:
            raise ValueError(f"--space must have each key once, got {key} {keys.count(key)} times; remove one")
        _add_space(name, raw, space)
    return raw


def relative_paths(name: str, overrides: Sequence[str] = ()) -> dict[str, str]:
    """The local paths, by their settings, that mean another place in another directory or with another home."""
    found = {where: section[key] for where, section, key in _local_paths(_overridden(name, overrides))}
    return {where: path for where, path in found.items() if not path.startswith("/")}


def _overridden(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    _check_alias(overrides)
    raw = _extended(name)
    scales = raw.pop("scales", None) or {}
    for override in overrides:
        if override.partition("=")[0] == "scale":
            _rescale(raw, scales, override.partition("=")[2])
    for override in overrides:
        if override.partition("=")[0] != "scale":
            _apply(raw, override)
    return raw


def _add_space(name: str, raw: dict[str, Any], space: str) -> None:
    """Puts `dotted.key=law(...)` into sweep.space, where the key is one word."""
    key, equals, law = space.partition("=")
    if not equals or not key:
        raise ValueError(f"--space must be dotted.key=law(...), got {space!r}; such as mixture.gamma=uniform(0,1)")
    sweep = raw["sweep"] = raw.get("sweep") or {}
    if isinstance(sweep, dict):
        laws = sweep["space"] = sweep.get("space") or {}
        if isinstance(laws, dict):
            laws[key] = law
            return
    raise ValueError(
        f"{name}: sweep and sweep.space must have settings by name where --space adds to them, got {sweep!r}; correct "
        "the file, or --set"
    )


def parent_of(name: str) -> str | None:
    """The recipe or file that a recipe or file extends."""
    parent = _read(name).get("extends")
    return None if parent is None else str(parent)


def _extended(name: str) -> dict[str, Any]:
    raw = _read(name)
    gamma = _pop_alias(name, raw)
    parent = raw.pop("extends", None)
    if parent is None:
        return _with_gamma(raw, gamma)
    if not isinstance(parent, str) or parent == name:
        raise ValueError(f"{name}: extends must name another recipe or file, got {parent!r}; correct it")
    inherited = _read(parent)
    if "extends" in inherited:
        raise ValueError(f"{name}: extends must name a recipe that extends none itself, got {parent!r}; name that one")
    inherited = _with_gamma(inherited, _pop_alias(parent, inherited))
    return _with_gamma({**inherited, **raw}, gamma)


def _pop_alias(name: str, raw: dict[str, Any]) -> list[Any]:
    """A file's `mixflow_gamma`, which is another name of mixture.gamma: none or one."""
    if ALIAS not in raw:
        return []
    gamma, mixture = raw.pop(ALIAS), raw.get("mixture")
    if isinstance(mixture, dict) and mixture.get("gamma", gamma) != gamma:
        raise ValueError(
            f"{name}: {ALIAS} must equal {ALIASED} where both are given, got {gamma!r} and {mixture['gamma']!r}; "
            "remove one"
        )
    return [gamma]


def _with_gamma(raw: dict[str, Any], gamma: list[Any]) -> dict[str, Any]:
    for value in gamma:
        put(raw, ALIAS, value)
    return raw


def _check_alias(overrides: Sequence[str]) -> None:
    """The alias and its key may not contradict each other; of one key given twice the later counts, as of any."""
    given = parse_overrides([o for o in overrides if o.partition("=")[0] == ALIASED])
    alias = parse_overrides([o for o in overrides if o.partition("=")[0] == ALIAS])
    if given and alias and given != alias:
        raise ValueError(
            f"--set {ALIAS} must equal {ALIASED} where both are given, got {alias['mixture']['gamma']!r} and "
            f"{given['mixture']['gamma']!r}; remove one"
        )


def _rescale(raw: dict[str, Any], scales: Any, scale: str) -> None:
    known = ["full", *(scales if isinstance(scales, dict) else ())]
    if scale not in known:
        raise ValueError(f"--set scale must be one of {', '.join(known)}, got {scale!r}; correct it")
    for key, value in {} if scale == "full" else scales[scale].items():
        put(raw, key, value)


def validated(name: str, raw: dict[str, Any]) -> Experiment:
    """The experiment that settings describe.

    Raises:
        ValueError: one line naming what is wrong, where, and the mend.
    """
    try:
        # Through JSON: in its strict mode arrays may become tuples and objects dataclasses, and nothing else is bent.
        return Experiment.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ValueError(f"{name}: {one_line(error, Experiment)}") from error


def to_be_given(section: Any, where: str = "") -> list[str]:
    """Dotted keys of what a recipe leaves to its user."""
    if section == TO_BE_GIVEN:
        return [where]
    inner: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(section, dict):
        inner = iter(section.items())
    elif isinstance(section, list):
        inner = iter(enumerate(section))
    return [key for name, value in inner for key in to_be_given(value, f"{where}.{name}" if where else str(name))]


def filled(section: Any) -> Any:
    """The settings with stand-ins for what is to be given: enough to say what the model costs."""
    if isinstance(section, dict):
        stand_ins = {"sha256": "0" * 64, "num_classes": 1}
        return {
            key: stand_ins.get(key.rpartition("_")[2] if key.endswith("sha256") else key, "/to/be/given")
            if value == TO_BE_GIVEN
            else filled(value)
            for key, value in section.items()
        }
    return [filled(value) for value in section] if isinstance(section, list) else section


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`dotted.key=value` arguments as nested settings."""
    raw: dict[str, Any] = {}
    for override in overrides:
        _apply(raw, override)
    return raw


def _local_paths(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where local paths are given: the setting, and the section and key that hold it."""
    return (found for path in PATHS for found in _local_path(raw, path, path))


def _local_path(raw: Any, path: str, where: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    first, _, rest = path.partition(".")
    if isinstance(raw, list):
        for entry in raw:
            yield from _local_path(entry, path, where)
    elif isinstance(raw, dict) and rest:
        yield from _local_path(raw.get(first), rest, where)
    elif isinstance(raw, dict):
        value = raw.get(first)
        is_uri = isinstance(value, str) and re.match("file:|[A-Za-z][A-Za-z0-9+.-]*://", value)
        if isinstance(value, str) and value not in ("", TO_BE_GIVEN) and not is_uri:
            yield where, raw, first


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
            f"unknown recipe {name!r}{nearest(name, recipes())}; give one of them, or a path that ends in .yaml"
        )
    if len(text) > MOST_BYTES:
        raise ValueError(f"experiment file must have at most {MOST_BYTES} characters, got {len(text)} in {name!r}")
    try:
        raw = yaml.load(text, _Loader)
    except _YAML_RAISES as error:
        raise ValueError(f"experiment file must be YAML, got {name!r}; {_reason(error)}") from error
    raw = _plain(raw)
    if not isinstance(raw, dict):
        got = "nothing" if raw is None else type(raw).__name__
        raise ValueError(f"experiment file must be a map of settings, got {got} in {name!r}; correct it")
    return raw


def _reason(error: Exception) -> str:
    text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return " ".join(text.split())


def _plain(value: Any, where: str = "", left: Iterator[int] | None = None, depth: int = 0) -> Any:
    """A copy of what YAML gave, in which no two places share a list or map.

    Raises:
        ValueError: it holds other things than JSON does, or more of them or deeper than any experiment.
    """
    left = iter(range(MOST_VALUES)) if left is None else left
    if next(left, None) is None or depth > DEEPEST:
        raise ValueError(
            f"{where} must not lie beyond {MOST_VALUES} values or {DEEPEST} deep, aliases followed; shorten it"
        )
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise ValueError(
                f"{where or 'the file'} must have texts as keys, got {odd[0]!r}; put it in quotes, or 0.8 for 0,8"
            )
        return {
            _plain(key, f"a key of {where or 'the file'}"): _plain(
                inner, f"{where}.{key}" if where else key, left, depth + 1
            )
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_plain(inner, f"{where}.{place}", left, depth + 1) for place, inner in enumerate(value)]
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where} must be text of whole Unicode characters, got {value!r}; correct it")
    if value is not None and not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise ValueError(f"{where} must be a plain YAML number, text, list or map, got a {kind}; correct it")
    return value


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set must be dotted.key=value, got {override!r}")
    if key != key.strip():
        raise ValueError(f"--set must be dotted.key=value without blanks around =, got {override!r}")
    try:
        value = yaml.load(text, _Loader)
    except _YAML_RAISES as error:
        raise ValueError(f"--set {key} must have a value that is YAML, got {text!r}") from error
    value = _plain(value, _plain(f"--set {key}", "--set"))
    if key.endswith("sha256") and not (text and value is None):
        value = text  # 64 digits are a number in YAML
    put(raw, key, value)


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key, as `--set` does.

    Raises:
        ValueError: the key leads through a value that is no section, or beyond the end of a list.
    """
    *parents, last = (ALIASED if key == ALIAS else key).split(".")
    if len(parents) > DEEPEST:
        raise ValueError(f"--set {key[:60]}... must be a key at most {DEEPEST} deep, got {len(parents)}; shorten it")
    target: Any = raw
    for parent in parents:
        target = _step(target, parent, key)
    if isinstance(target, list):
        target[_index(target, last, key)] = value
    else:
        target[last] = value


def _step(target: Any, part: str, key: str) -> Any:
    inner = target[_index(target, part, key)] if isinstance(target, list) else target.setdefault(part, {})
    if inner is None and isinstance(target, dict):
        inner = target[part] = {}
    if not isinstance(inner, dict | list):
        raise ValueError(f"--set {key}: {part} must be a section, got the value {inner!r}")
    return inner


def _index(target: list[Any], part: str, key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) >= len(target):
        raise ValueError(f"--set {key}: {part!r} must be a place in a list of {len(target)}, counted from 0")
    return int(part)
