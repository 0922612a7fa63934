"""Refusal of misspelt choices: none of them may fall through to another branch."""

from __future__ import annotations

from typing import get_args


def require_choice(name: str, value: object, choices: object) -> None:
    """Raises ValueError unless `value` is one of `choices`, a Literal type."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
