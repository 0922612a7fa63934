"""The result file of a campaign: one line of JSON for each round, so that what was stopped goes on after them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_note import commit, now


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rounds that are there; a last line that was cut off while it was written is removed."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    return [json.loads(line) for line in lines]


def append_result(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a round."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**entry, "commit": commit(), "at": now()}) + "\n")
