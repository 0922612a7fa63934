"""A durable queue of events in the workspace: what MLflow has not acknowledged yet."""

from __future__ import annotations

import json
import logging
import re
import threading
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from orchestration.storage import Storage

log = logging.getLogger(__name__)

SPOOLS = "tracking"  # every spool is a directory below this one
HEADER = "spool.json"  # names the experiment, for `replay`

Event = dict[str, Any]  # one line of a segment: "kind", "run" and what the kind needs


def list_spools(workspace: Storage) -> list[str]:
    """Every spool of the workspace, sorted, whether it holds events or not."""
    return [path.removesuffix(f"/{HEADER}") for path in workspace.list(SPOOLS) if path.endswith(f"/{HEADER}")]


@dataclass(frozen=True)
class Batch:
    """The oldest segments and their events; `weight` counts metric values one by one."""

    segments: list[str]
    events: list[Event]
    weight: int


class Spool:
    """A durable queue: events wait in memory for a second, then in segments `<number>-<events>-<writer>.jsonl`."""

    def __init__(self, workspace: Storage, directory: str):
        if PurePosixPath(directory).parts[:1] != (SPOOLS,) or len(PurePosixPath(directory).parts) < 2:
            raise ValueError(f"spool must be a directory below {SPOOLS}/, got {directory!r}; correct the path")
        self.directory = directory
        self._workspace = workspace
        self._lock = threading.Lock()  # the fields below
        self._writing = threading.Lock()  # one writer at a time keeps the order
        self._lines: list[str] = []
        self._lines_weight = 0
        self._outgoing: tuple[str, bytes] | None = None
        names = [path for path in workspace.list(directory) if re.fullmatch(r"\d+-\d+-\w+\.jsonl", self._name(path))]
        self._segments = deque(self._name(path) for path in names)
        self._number = 1 + max((int(name.split("-")[0]) for name in self._segments), default=-1)
        self._writer = uuid.uuid4().hex[:8]

    @property
    def pending(self) -> int:
        """Events that MLflow has not acknowledged, in memory or in segments."""
        with self._lock:
            outgoing = [self._outgoing[0]] if self._outgoing else []
            return self._lines_weight + sum(map(_segment_weight, [*outgoing, *self._segments]))

    def describe(self, experiment: str) -> None:
        """Names the experiment, for `replay`."""
        self._workspace.put(f"{self.directory}/{HEADER}", json.dumps({"experiment": experiment}).encode())

    def experiment(self) -> str:
        """The name that `describe` left.

        Raises:
            ValueError: there is no such spool, or its header is unreadable.
        """
        try:
            return str(json.loads(self._workspace.read(f"{self.directory}/{HEADER}"))["experiment"])
        except ValueError as error:
            raise ValueError(
                f"{self.directory}/{HEADER} must name the experiment, but is unreadable ({error})"
            ) from error
        except FileNotFoundError as error:
            there = ", ".join(list_spools(self._workspace)) or "none"
            raise ValueError(f"spool must exist, got {self.directory!r}; there are: {there}") from error

    def append(self, event: Event) -> None:
        """Queues an event in memory, durable after the next `flush`."""
        line = json.dumps(event)
        with self._lock:
            self._lines.append(line)
            self._lines_weight += weight(event)

    def flush(self) -> None:
        """Writes what is in memory; OSError where the workspace fails, after which it is tried again unchanged."""
        with self._writing:
            while outgoing := self._next_segment():
                name, data = outgoing
                # False would say that an earlier attempt of ours got through although its answer was lost.
                self._workspace.put_new(f"{self.directory}/{name}", data)
                with self._lock:
                    self._segments.append(name)
                    self._outgoing = None

    def oldest(self, max_events: int) -> Batch | None:
        """The oldest segments, of about `max_events` in all; None if there is none."""
        with self._lock:
            names = list(islice(self._segments, 1000))
        chosen: list[str] = []
        events: list[Event] = []
        while len(chosen) < len(names) and sum(map(_segment_weight, chosen)) < max_events:
            chosen.append(names[len(chosen)])
            events += self._events(chosen[-1])
        return Batch(chosen, events, sum(map(_segment_weight, chosen))) if chosen else None

    def done(self, batch: Batch, rejected: Sequence[Event]) -> None:
        """Forgets a delivered batch, after setting aside what MLflow refused."""
        if rejected:
            path = f"{self.directory}/rejected/{batch.segments[0]}"
            self._workspace.put(path, "".join(json.dumps(event) + "\n" for event in rejected).encode())
            first = rejected[0]
            log.warning(
                "MLflow refuses %d tracking events, set aside in %s; the first: %s of run %s: %s",
                *(sum(map(weight, rejected)), path, first["kind"], first["run"], first["reason"]),
            )
        for name in batch.segments:
            self._workspace.delete(f"{self.directory}/{name}")
            with self._lock:
                if name in self._segments:  # not if this is the second attempt to clean up
                    self._segments.remove(name)

    def reconsider(self) -> None:
        """Queues again what was set aside."""
        for path in self._workspace.list(f"{self.directory}/rejected"):
            for line in self._workspace.read(path).splitlines():
                event = json.loads(line)
                event.pop("reason")
                self.append(event)
            self.flush()
            self._workspace.delete(path)

    def _next_segment(self) -> tuple[str, bytes] | None:
        """The segment to write: one that failed is written again under its name, so that it cannot be there twice."""
        with self._lock:
            if self._outgoing is None and self._lines:
                name = f"{self._number:012d}-{self._lines_weight}-{self._writer}.jsonl"
                self._outgoing = name, "".join(line + "\n" for line in self._lines).encode()
                self._number += 1
                self._lines, self._lines_weight = [], 0
            return self._outgoing

    def _events(self, name: str) -> list[Event]:
        try:
            content = self._workspace.read(f"{self.directory}/{name}")
        except FileNotFoundError:
            log.warning("%s/%s is gone, somebody else sent or removed it", self.directory, name)
            return []
        try:
            return [json.loads(line) for line in content.splitlines()]
        except ValueError as error:  # what comes after it must not wait for ever
            aside = f"{self.directory}/unreadable/{name}"
            self._workspace.put(aside, content)
            log.warning("%s/%s is unreadable (%s) and set aside as %s", self._workspace.uri, name, error, aside)
            return []

    def _name(self, path: str) -> str:
        return path.removeprefix(f"{self.directory}/")


def weight(event: Event) -> int:
    """How many metric values an event holds, 1 for any other."""
    return len(event["metrics"]) if event["kind"] == "metrics" else 1


def _segment_weight(name: str) -> int:
    return int(name.split("-")[1])
