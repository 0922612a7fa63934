"""What a sweep knows of its trials: one object each in the workspace, written when it is born and when it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orchestration.space import Law, Tried, holds
from orchestration.storage import Storage
from orchestration.trials import CONTROLS, label_of

State = Literal["running", "finished", "pruned", "failed"]


@dataclass
class Entry:
    """A trial.

    Attributes:
        label: `standard`, `matched`, or `t<number>`.
        number: from 0; -1 of the controls.
        params: dotted key -> value.
        state: `running` is also what a sweep that was killed leaves.
        reason: why it failed.
        diverged: whether it failed for numbers that were not finite, which trying again would not change.
        refused: whether its parameters make no valid run, so that nothing of it was run.
        history: [step, objective], ascending.
    """

    label: str
    number: int
    params: dict[str, Any]
    state: State = "running"
    reason: str = ""
    diverged: bool = False
    refused: bool = False
    history: list[list[float]] = field(default_factory=list)

    @property
    def is_control(self) -> bool:
        """Whether it is a control."""
        return self.label in CONTROLS

    @property
    def is_open(self) -> bool:
        """Whether it is still to be run, or to be tried again."""
        return self.state == "running" or (self.state == "failed" and not (self.diverged or self.refused))

    @property
    def step(self) -> int:
        """Of its last objective; 0 before the first."""
        return int(self.history[-1][0]) if self.history else 0

    @property
    def objective(self) -> float | None:
        """Its last value; None before the first."""
        return self.history[-1][1] if self.history else None

    def saw(self, step: int, value: float) -> None:
        """A value that was told, perhaps again."""
        known = {int(s): v for s, v in self.history}
        self.history = [[s, v] for s, v in sorted({**known, step: value}.items())]


class Ledger:
    """The trials of one sweep, by label: controls first, then in the order of their numbers.

    Args:
        storage: of the workspace.
        home: the sweep's directory.
    """

    def __init__(self, storage: Storage, home: str) -> None:
        self.storage, self.home = storage, home
        found = [self._read(path) for path in storage.list(f"{home}/trials") if path.endswith(".json")]
        self.entries = {entry.label: entry for entry in sorted(found, key=lambda e: (e.number, e.label == "matched"))}

    def _read(self, path: str) -> Entry:
        return Entry(**json.loads(self.storage.read(path)))

    def born(self, number: int, params: dict[str, Any], label: str = "") -> Entry:
        """A new trial, known from now on; one that was born before under this label is taken as it was."""
        entry = Entry(label or label_of(number), number, params)
        if not self.storage.put_new(self._path(entry), _bytes(entry)):
            entry = self._read(self._path(entry))
        self.entries[entry.label] = entry
        return entry

    def close(self, entry: Entry, state: State, reason: str = "", *, diverged: bool = False) -> None:
        """What became of a trial."""
        entry.state, entry.reason, entry.diverged = state, reason, diverged
        self.storage.put(self._path(entry), _bytes(entry))

    @property
    def controls(self) -> list[Entry]:
        """The controls that were born."""
        return [entry for entry in self.entries.values() if entry.is_control]

    @property
    def trials(self) -> list[Entry]:
        """The others, by number."""
        return [entry for entry in self.entries.values() if not entry.is_control]

    def within(self, laws: Mapping[str, Law]) -> list[Entry]:
        """The trials that a space could have drawn: of a sweep that was extended, those of the present one."""
        return [entry for entry in self.trials if holds(laws, entry.params)]

    @property
    def tried(self) -> list[Tried]:
        """What suggestions are made from."""
        return [_tried(entry) for entry in self.trials]

    def _path(self, entry: Entry) -> str:
        return f"{self.home}/trials/{entry.label}.json"


def _tried(entry: Entry) -> Tried:
    if entry.state == "pruned" and entry.objective is not None:
        return Tried(entry.number, entry.params, pruned=(entry.step, entry.objective))
    return Tried(
        entry.number,
        entry.params,
        entry.objective if entry.state == "finished" else None,
        diverged=entry.state == "failed" and entry.diverged,
    )


def _bytes(entry: Entry) -> bytes:
    return json.dumps(asdict(entry), indent=1).encode()
