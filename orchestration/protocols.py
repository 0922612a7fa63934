"""Which numbers may stand in one table: those of equal protocols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from workers.manifest import canonical_hash

# A cell's name is its whole sampler, so cells of one name compare whatever other cells stand beside them; runs
# of unequal numbers of seeds may share a table, which shows beside each interval how many it is over.
NOT_COMPARED = ("samplers", "nfe", "replicates")


class Difference(NamedTuple):
    """The first key in which two protocols differ (dotted where it lies deeper), and its value in each."""

    key: str
    first: Any
    second: Any


def is_adaptive(cell: str) -> bool:
    """Whether the number of network evaluations is an outcome of the cell's sampler and no setting."""
    return cell.startswith("dopri5")


def fingerprint(protocol: Mapping[str, Any]) -> str:
    """Hash of what every number of an experiment depends on besides its arm and its cell, 12 hexadecimal digits.

    Metrics of one key `eval/<metric>/<cell>` may be compared where the fingerprints are equal.
    """
    return canonical_hash({key: value for key, value in protocol.items() if key not in NOT_COMPARED})[:12]


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference | None:
    """What keeps the numbers of two protocols out of one table; None if nothing does."""
    for key in {**first, **second}:
        if key not in NOT_COMPARED and first.get(key) != second.get(key):
            return _innermost(Difference(key, first.get(key), second.get(key)))
    counts = first.get("nfe", {}), second.get("nfe", {})
    for cell in counts[0]:
        if cell in counts[1] and not is_adaptive(cell) and counts[0][cell] != counts[1][cell]:
            return Difference(f"nfe.{cell}", counts[0][cell], counts[1][cell])
    return None


def _innermost(found: Difference) -> Difference:
    """The first key below, where both values are maps."""
    first, second = found.first, found.second
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return found
    key = next(key for key in {**first, **second} if first.get(key) != second.get(key))
    return _innermost(Difference(f"{found.key}.{key}", first.get(key), second.get(key)))
