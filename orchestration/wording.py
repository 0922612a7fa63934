"""Validation errors in the words of this project: one line that names the key, the rule, the value and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from workers.models.family import CONFIGS

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
# In words, by the pattern of a field.
PATTERNS = {
    r"^[0-9a-f]{64}$": "be 64 hexadecimal digits, as sha256sum prints them",
    NAME: "be letters, digits, '_', '.' and '-', a letter or digit first",
}


def one_line(error: ValidationError, root: type) -> str:
    """The first problem of a validation, in the words of this project."""
    problem = error.errors(include_url=False)[0]
    # The family that a model's section was read as is no key of the file.
    where = ".".join(str(part) for part in problem["loc"] if part not in CONFIGS)
    value = problem["input"]
    shown = f"a {type(value).__name__} of {len(value)}" if isinstance(value, list | dict) else repr(value)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where!r}{nearest(str(problem['loc'][-1]), _known_keys(root, problem['loc'][:-1]))}"
    if problem["type"] == "union_tag_invalid":
        tag = problem["ctx"]["tag"]
        return f"{where}.family must be one of {', '.join(CONFIGS)}, got {tag!r}{nearest(tag, CONFIGS)}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where} must be given; add it"
    if problem["type"] == "value_error":
        section = where
        text = problem["msg"].removeprefix("Value error, ")
        own = section.rpartition(".")[2]  # a section may call itself by its last name
        if section and text.startswith(f"{own} "):
            return section + text.removeprefix(own)
        return f"{section}.{text}" if section and not text.startswith(section) else text
    if problem["loc"] and problem["loc"][-1] == "gamma" and value == "auto":
        reason = "nothing measured before was found to predict the best"
        return f"{where} must be a number, got 'auto'; {reason}: search it by a sweep"
    rule, mend = _rule(problem["type"], problem["msg"], problem.get("ctx", {})), "correct it"
    if value is None:
        shown, mend = "nothing", "give a value"
    elif problem["type"].startswith("int_") and isinstance(value, float) and value.is_integer():
        mend = f"write {int(value)}"
    return f"{where} must {rule}, got {shown}; {mend}"


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
    if kind == "string_pattern_mismatch" and limits["pattern"] in PATTERNS:
        return PATTERNS[limits["pattern"]]
    if kind in known:
        return known[kind].format(**limits)
    return message.removeprefix("Input should ").removeprefix("Value should ")


def _known_keys(section: Any, location: tuple[Any, ...]) -> list[str]:
    """The keys of the section at a location below `section`."""
    for part in location:
        if part in CONFIGS:
            section = CONFIGS[part]
            continue
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


def nearest(word: str, known: Any) -> str:
    """What was probably meant, or all that is known, to be put behind a message."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else (f"; known are {', '.join(known)}" if known else "")
