"""The single MLflow writer, with its durable spool.

MLflow never blocks and never kills a run. What is handed to a `Tracker` becomes durable in the workspace first (the
spool: numbered JSON-lines segments) and is sent from there by another thread, in batches, oldest first; a segment is
deleted when MLflow has acknowledged all of it, so an empty spool means that everything arrived. Each (run, metric key,
step) arrives once: what may have reached MLflow without an answer is sent again unchanged, which MLflow stores once,
and a step that MLflow already holds is skipped. One process owns a spool at a time.

With tracked.py, which reads, the only file that imports mlflow, where it is used (3 s).
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shlex
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestration.s3_client import s3_environment
from orchestration.storage import Storage

log = logging.getLogger(__name__)

SPOOLS = "tracking"  # every spool is a directory below this one
HEADER = "spool.json"  # names the experiment, for `replay`
RUN_KEY = "mixflow.run_key"  # the tag that says which of our runs an MLflow run is
CLAIMED = "mixflow.claimed"  # set once we know the run's id; a run without it stems from a request that got no answer
CONFLICTS = "mixflow.param_conflicts"
DRIVER = "postgresql+psycopg2"

SPOOL_EVERY_S = 1.0  # at most this much is lost to a kill between two calls of `flush`
RETRY_S = 2.0
STALLED_S = 5.0  # drain waits this long for MLflow to make progress again
HOPELESS_S = 60.0  # MLflow fails this one event for that long, but answers otherwise: set it aside
ANSWER_S = 5.0
BATCH_EVENTS = 5000
# MLflow's own limits of one request, and of the length of a parameter.
AT_ONCE = {"metrics": 1000, "params": 100, "tags": 100}
MAX_PARAM_CHARS = 5999
# MLflow's answers that repeating the request cannot change. Anything else may be an outage, whose events must be kept.
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}
STATUSES = ("FINISHED", "FAILED", "KILLED")

Event = dict[str, Any]  # one line of a segment: "kind", "run" and what the kind needs


@dataclass(frozen=True)
class Metric:
    """One value of a metric: `step` counts from 0, `timestamp_ms` is the Unix time of the measurement in ms."""

    key: str
    step: int
    value: float
    timestamp_ms: int


@dataclass(frozen=True)
class Replay:
    """What `replay` did: events sent (of them `rejected`: refused by MLflow and set aside) and still waiting."""

    sent: int
    pending: int
    rejected: int


class Tracker:
    """Hands runs, metrics and artifacts to MLflow in the background.

    Every method but `drain` returns without talking to MLflow; only the workspace can make one fail (OSError). Runs are
    named by a key of the caller's, unique within the experiment: the same key is the same MLflow run for ever, also in
    another process after a kill.
    """

    def __init__(self, workspace: Storage, tracking_uri: str, experiment: str, spool: str):
        """Opens the spool, a directory below `tracking/` in the workspace; what it still holds is sent first."""
        self._spool = _Spool(workspace, spool)
        self._spool.describe(experiment)
        self._sender = _Sender(workspace, tracking_uri, experiment)
        self._delivered = self._rejected = 0
        self._connected = False
        self._last_error: str | None = None
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=f"tracking-{name}", daemon=True)
            for name, run in (("spool", self._spool_on), ("send", self._send_on))
        ]
        for thread in self._threads:
            thread.start()

    def start_run(
        self,
        key: str,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the run `key`, or continues it; `parent` is the key of the run under which MLflow shows it.

        Nested params are flattened with dots. A param that MLflow has with another value keeps it; a warning and the
        tag `mixflow.param_conflicts` name it.
        """
        if not key or re.search(r"['\"\\]", key):
            raise ValueError(f"run key must be non-empty without quotes and backslashes, got {key!r}; rename the run")
        self._hand_over(
            {
                "kind": "start",
                "run": key,
                "name": name,
                "parent": parent,
                "params": list(_flatten(params or {}).items()),
                "tags": [(tag, str(value)) for tag, value in (tags or {}).items()],
                "time": _now_ms(),
            }
        )

    def log(self, key: str, metrics: Sequence[Metric]) -> None:
        """Hands over values of metrics of the run `key`. Of several values of one (key, step) the first is kept."""
        rows = [(metric.key, int(metric.step), float(metric.value), int(metric.timestamp_ms)) for metric in metrics]
        if rows:
            self._hand_over({"kind": "metrics", "run": key, "metrics": rows})

    def artifact(self, key: str, path: str, artifact_path: str) -> None:
        """Copies the workspace's object `path` to the directory `artifact_path` ("" is the root) of the artifacts.

        It is read when it is sent: leave it there unchanged.
        """
        self._hand_over({"kind": "artifact", "run": key, "path": path, "artifact_path": artifact_path})

    def tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Sets tags of the run; the last value of a tag stays."""
        self._hand_over({"kind": "tags", "run": key, "tags": [(tag, str(value)) for tag, value in tags.items()]})

    def register(self, key: str, model: str, *, source: str, alias: str, tags: Mapping[str, str]) -> None:
        """Makes what the run left at `source`, a directory's URI, a version of a registered model, called `alias`.

        A version of the same source stays the only one. A server takes sources on object storage, and none of its
        clients' own disks: that event is set aside, and a warning says so.
        """
        pairs = [(tag, str(value)) for tag, value in tags.items()]
        self._hand_over(
            {"kind": "register", "run": key, "model": model, "source": source, "alias": alias, "tags": pairs}
        )

    def end_run(self, key: str, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r}; correct the call")
        self._hand_over({"kind": "end", "run": key, "status": status, "time": _now_ms()})

    def flush(self) -> None:
        """Returns when everything handed over so far is durable in the workspace.

        Raises:
            OSError: the workspace cannot be written; what was handed over is kept, call again.
        """
        self._spool.flush()

    def drain(self, timeout_s: float) -> int:
        """Waits, at most `timeout_s` seconds, until MLflow has everything; ends early when MLflow makes no progress.

        Returns:
            The number of events (each metric value is one) that MLflow does not have yet; the spool keeps them.
        """
        self.flush()
        start = time.monotonic()
        while self._spool.pending and time.monotonic() - start < timeout_s:
            idle = time.monotonic() - max(start, self._sender.moved_at)
            if self._last_error is not None and idle > STALLED_S:
                break
            time.sleep(0.05)
        return self._spool.pending

    def run_id(self, key: str) -> str | None:
        """MLflow's id of the run, or None as long as MLflow was not asked."""
        return self._sender.run_ids.get(key)

    def status(self) -> dict[str, Any]:
        """`connected`, events `pending` and, by this process, `delivered` (of them `rejected`), `last_error`."""
        return {
            "connected": self._connected,
            "pending": self._spool.pending,
            "delivered": self._delivered,
            "rejected": self._rejected,
            "last_error": self._last_error,
        }

    def close(self) -> None:
        """Makes everything durable and stops; does not wait for MLflow (`drain` does)."""
        try:
            self.flush()
        finally:
            self._closing.set()
            for thread in self._threads:
                thread.join(timeout=2.0)  # one that still waits for MLflow's answer ends by itself after it

    def _hand_over(self, event: Event) -> None:
        if self._closing.is_set():
            raise RuntimeError("the tracker is closed")
        self._spool.append(event)

    def _spool_on(self) -> None:
        failed = False
        while not self._closing.wait(SPOOL_EVERY_S):
            try:
                self._spool.flush()
                failed = False
            except OSError as error:
                if not failed:
                    log.warning("tracking events wait in memory, the workspace cannot be written: %s", error)
                failed = True

    def _send_on(self) -> None:
        batch: _Batch | None = None
        while not self._closing.is_set():
            try:
                # A batch that failed is tried again as it was, so that the sender recognises what fails for ever.
                batch = batch or self._spool.oldest(BATCH_EVENTS)
                if batch is None:
                    self._closing.wait(0.1)
                    continue
                if not self._connected:
                    self._sender.connect()
                    self._connected = True
                rejected = self._sender.deliver(batch.events)
                self._spool.done(batch, rejected)
                self._arrived(batch, rejected)
                batch = None
            except Exception as error:  # of whatever kind, from MLflow or from the workspace: a warning, never the end
                self._failed(error)
                self._closing.wait(RETRY_S)

    def _arrived(self, batch: _Batch, rejected: Sequence[Event]) -> None:
        self._rejected += sum(map(_weight, rejected))
        self._delivered += batch.weight
        if self._last_error is not None:
            log.info("MLflow at %s answers again", self._sender.shown_uri)
        self._last_error = None

    def _failed(self, error: Exception) -> None:
        self._connected = False
        message = self._sender.one_line(error)
        if self._last_error is None:
            where = self._spool.directory
            log.warning("MLflow at %s: %s; events are kept in %s", self._sender.shown_uri, message, where)
        self._last_error = message


def replay(workspace: Storage, tracking_uri: str, spool: str) -> Replay:
    """Delivers what a spool still holds, including what was set aside earlier (the reason may be mended now).

    Returns when all is delivered, or when MLflow makes no progress. Not for the spool of a run that is still going on.

    Raises:
        ValueError: there is no such spool.
    """
    store = _Spool(workspace, spool)
    experiment = store.experiment()
    store.reconsider()
    if not store.pending:
        return Replay(sent=0, pending=0, rejected=0)
    tracker = Tracker(workspace, tracking_uri, experiment, spool)
    try:
        pending = tracker.drain(float("inf"))
        status = tracker.status()
    finally:
        tracker.close()
    return Replay(sent=status["delivered"], pending=pending, rejected=status["rejected"])


def list_spools(workspace: Storage) -> list[str]:
    """Every spool of the workspace, sorted, whether it holds events or not."""
    return [path.removesuffix(f"/{HEADER}") for path in workspace.list(SPOOLS) if path.endswith(f"/{HEADER}")]


@dataclass(frozen=True)
class _Batch:
    segments: list[str]
    events: list[Event]
    weight: int


class _Spool:
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
        self._workspace.put(f"{self.directory}/{HEADER}", json.dumps({"experiment": experiment}).encode())

    def experiment(self) -> str:
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
        line = json.dumps(event)
        with self._lock:
            self._lines.append(line)
            self._lines_weight += _weight(event)

    def flush(self) -> None:
        with self._writing:
            while outgoing := self._next_segment():
                name, data = outgoing
                # False would say that an earlier attempt of ours got through although its answer was lost.
                self._workspace.put_new(f"{self.directory}/{name}", data)
                with self._lock:
                    self._segments.append(name)
                    self._outgoing = None

    def oldest(self, max_events: int) -> _Batch | None:
        """The oldest segments, of about `max_events` in all; None if there is none."""
        with self._lock:
            names = list(islice(self._segments, 1000))
        chosen: list[str] = []
        events: list[Event] = []
        while len(chosen) < len(names) and sum(map(_segment_weight, chosen)) < max_events:
            chosen.append(names[len(chosen)])
            events += self._events(chosen[-1])
        return _Batch(chosen, events, sum(map(_segment_weight, chosen))) if chosen else None

    def done(self, batch: _Batch, rejected: Sequence[Event]) -> None:
        """Forgets a delivered batch, after setting aside what MLflow refused."""
        if rejected:
            path = f"{self.directory}/rejected/{batch.segments[0]}"
            self._workspace.put(path, "".join(json.dumps(event) + "\n" for event in rejected).encode())
            first = rejected[0]
            log.warning(
                "MLflow refuses %d tracking events, set aside in %s; the first: %s of run %s: %s",
                *(sum(map(_weight, rejected)), path, first["kind"], first["run"], first["reason"]),
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


class _Rejected(Exception):
    """MLflow will never take this event; the message says why."""


@dataclass
class _Run:
    key: str
    run_id: str
    stored: set[str] = field(default_factory=set)  # metric keys that MLflow held when we met the run
    steps: dict[str, set[int]] = field(default_factory=dict)  # by metric key, once read: the steps that MLflow holds


class _Sender:
    """Delivers events to MLflow. Delivering a batch again, after whatever failure, is harmless."""

    def __init__(self, workspace: Storage, tracking_uri: str, experiment: str):
        self.shown_uri = without_password(tracking_uri)
        self.run_ids: dict[str, str] = {}
        self.moved_at = 0.0  # monotonic seconds of the last progress
        self._workspace, self._uri, self._experiment = workspace, tracking_uri, experiment
        self._client: Any = None
        self._experiment_id = ""
        self._runs: dict[str, _Run] = {}
        self._failing_since: dict[str, float] = {}
        self._achieved: set[str] = set()  # items of the batch that worked, perhaps in an earlier attempt
        self._rejected: list[Event] = []

    def connect(self) -> None:
        """Raises what went wrong, within seconds, if MLflow does not answer."""
        if is_http(self._uri) and _ask(self._uri, "/health") >= 500:
            raise OSError("the server is not ready")
        if self._client is None:
            client = mlflow_client(self._uri)
            self._experiment_id = self._open_experiment(client)
            self._client = client
            self.moved_at = time.monotonic()

    def deliver(self, events: Iterable[Event]) -> list[Event]:
        """Sends the events in order; returns those that MLflow refuses, each with its "reason"."""
        self._rejected = []
        handlers: dict[str, Callable[[Event], None]] = {
            "start": self._start,
            "metrics": self._metrics,
            "params": self._params,
            "tags": self._tags,
            "artifact": self._artifact,
            "register": self._register,
            "end": self._end,
        }
        for event in _merge_metrics(events):
            try:
                handlers[event["kind"]](event)
            except _Rejected as reason:
                self._rejected.append({**event, "reason": str(reason)})
        self._achieved.clear()
        return self._rejected

    def one_line(self, error: Exception) -> str:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        password = urlsplit(self._uri).password
        for secret in (password, unquote(password)) if password else ():
            text = text.replace(secret, "***")
        return without_password(text)[:500]

    def _start(self, event: Event) -> None:
        key, params = event["run"], dict(event["params"])
        found = self._find(key)
        if found is None:
            run = self._call(f"start {key}", self._client.create_run, **self._creation(event))
            self._runs[key] = _Run(key, run.info.run_id)
            self.run_ids[key] = run.info.run_id
        else:
            run, known = found, self._remember(key, found)
            if run.info.status != "RUNNING":
                self._call(f"restart {key}", self._client.update_run, known.run_id, "RUNNING")
        conflicts = [name for name, value in params.items() if run.data.params.get(name, value) != value]
        tags = [(CLAIMED, "true"), *event["tags"]]
        if conflicts:
            log.warning("run %s keeps the params it was started with: %s", key, ", ".join(conflicts))
            tags.append((CONFLICTS, ", ".join(conflicts)[:5000]))
        self._log(self._runs[key], "tags", tags)
        new = [(name, value) for name, value in params.items() if name not in run.data.params]
        self._log(self._runs[key], "params", new)

    def _creation(self, event: Event) -> dict[str, Any]:
        tags = {RUN_KEY: event["run"]}
        if event["parent"]:
            try:
                tags["mlflow.parentRunId"] = self._run(event["parent"]).run_id
            except _Rejected as reason:
                log.warning("run %s is shown without its parent: %s", event["run"], reason)
        return {
            "experiment_id": self._experiment_id,
            "run_name": event["name"],
            "start_time": event["time"],
            "tags": tags,
        }

    def _metrics(self, event: Event) -> None:
        run = self._run(event["run"])
        fresh: dict[tuple[str, int], Any] = {}
        for row in event["metrics"]:
            key, step = row[0], row[1]
            if step not in self._steps(run, key):
                fresh.setdefault((key, step), row)
        for key, step, *_ in self._log(run, "metrics", list(fresh.values())):
            run.steps[key].add(step)

    def _params(self, event: Event) -> None:
        self._log(self._run(event["run"]), "params", event["params"])

    def _tags(self, event: Event) -> None:
        self._log(self._run(event["run"]), "tags", event["tags"])

    def _artifact(self, event: Event) -> None:
        run, path = self._run(event["run"]), event["path"]
        try:
            data = self._workspace.read(path)
        except (FileNotFoundError, ValueError) as error:
            raise _Rejected(f"artifact {path} cannot be read: {error}") from error
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / PurePosixPath(path).name
            copy.write_bytes(data)
            arguments = run.run_id, str(copy), event["artifact_path"] or None
            self._call(f"artifact {run.key} {path}", self._client.log_artifact, *arguments)

    def _register(self, event: Event) -> None:
        run, model, source = self._run(event["run"]), event["model"], event["source"]
        item = f"register {model} {source}"
        if not self._call(f"look for {model}", self._client.search_registered_models, f"name = '{model}'"):
            self._call(f"make {model}", self._client.create_registered_model, model)
        versions = self._call(f"versions of {model}", self._client.search_model_versions, f"name = '{model}'")
        there = next((version for version in versions if version.source == source), None)
        version = there or self._call(
            item, self._client.create_model_version, model, source, run_id=run.run_id, tags=dict(event["tags"])
        )
        self._call(f"{item} alias", self._client.set_registered_model_alias, model, event["alias"], version.version)

    def _end(self, event: Event) -> None:
        run = self._run(event["run"])
        self._find(run.key)  # removes a second run that a delayed request may have made meanwhile
        arguments = run.run_id, event["status"], event["time"]
        self._call(f"end {run.key}", self._client.set_terminated, *arguments)
        del self._runs[run.key]  # its steps need not stay in memory

    def _run(self, key: str) -> _Run:
        if key not in self._runs:
            found = self._find(key)
            if found is None:
                raise _Rejected(f"MLflow has no run {key} in {self._experiment}: it was not started, or was deleted")
            self._remember(key, found)
        return self._runs[key]

    def _remember(self, key: str, run: Any) -> _Run:
        self.run_ids[key] = run.info.run_id
        return self._runs.setdefault(key, _Run(key, run.info.run_id, stored=set(run.data.metrics)))

    def _find(self, key: str) -> Any:
        """The MLflow run of our run `key`, or None. Removes others, made by requests whose answers were lost."""
        where = f"tags.`{RUN_KEY}` = '{key}'"
        runs = self._call(f"find {key}", self._client.search_runs, [self._experiment_id], where, max_results=100)
        known = self._runs[key].run_id if key in self._runs else None
        runs = sorted(runs, key=lambda run: (run.info.run_id != known, CLAIMED not in run.data.tags, run.info.run_id))
        for extra in runs[1:]:
            if CLAIMED not in extra.data.tags:
                self._call(f"remove {extra.info.run_id}", self._client.delete_run, extra.info.run_id)
        return runs[0] if runs else None

    def _steps(self, run: _Run, key: str) -> set[int]:
        if key not in run.steps:
            history = []
            if key in run.stored:
                history = self._call(f"history {run.key} {key}", self._client.get_metric_history, run.run_id, key)
            run.steps[key] = {metric.step for metric in history}
        return run.steps[key]

    def _log(self, run: _Run, kind: str, rows: Sequence[Any]) -> list[Any]:
        """Logs rows of metrics, params or tags; returns those that MLflow took, the others are set aside."""
        size = AT_ONCE[kind]
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [row for chunk in chunks for row in self._log_chunk(run, kind, chunk)]

    def _log_chunk(self, run: _Run, kind: str, rows: Sequence[Any]) -> list[Any]:
        item = f"{kind} {run.key} {rows[0]} {len(rows)}"
        entities = {kind: [_entity(kind, row) for row in rows]}
        try:
            self._call(item, self._client.log_batch, run.run_id, **entities, synchronous=True)
        except _Rejected as reason:
            if len(rows) > 1 and self._is_active(run):  # one bad row makes MLflow refuse all of them
                half = len(rows) // 2
                return self._log_chunk(run, kind, rows[:half]) + self._log_chunk(run, kind, rows[half:])
            self._rejected.append({"kind": kind, "run": run.key, kind: list(rows), "reason": str(reason)})
            return []
        return list(rows)

    def _is_active(self, run: _Run) -> bool:
        try:
            found = self._call(f"look at {run.key}", self._client.get_run, run.run_id)
        except _Rejected:
            return False
        return bool(found.info.lifecycle_stage == "active")

    def _call(self, item: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls MLflow. Raises _Rejected if that can never work, and anything else if it may work later."""
        try:
            answer = call(*args, **kwargs)
        except Exception as error:
            if _is_refusal(error) or self._is_hopeless(item):
                raise _Rejected(self.one_line(error)) from error
            raise
        self._failing_since.pop(item, None)
        if item not in self._achieved:  # what works again and again, before what fails, is no progress
            self._achieved.add(item)
            self.moved_at = time.monotonic()
        return answer

    def _is_hopeless(self, item: str) -> bool:
        """Whether MLflow has failed this item for a minute, as with a broken artifact store, but answers otherwise."""
        try:
            self._client.get_experiment(self._experiment_id)
        except Exception as error:
            log.debug("an outage: %s", self.one_line(error))
            return False
        self.moved_at = time.monotonic()  # so that `drain` waits until the item works or is hopeless
        return time.monotonic() - self._failing_since.setdefault(item, time.monotonic()) >= HOPELESS_S

    def _open_experiment(self, client: Any) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            # Without a server MLflow would put artifacts into ./mlruns, wherever this process happens to run.
            location = None if is_http(self._uri) else f"{self._workspace.uri}/mlartifacts"
            return str(client.create_experiment(self._experiment, artifact_location=location))
        if experiment.lifecycle_stage == "deleted":
            log.warning("the MLflow experiment %s was deleted, it is restored", self._experiment)
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)


def check_tracking(tracking_uri: str) -> str | None:
    """Preflight of the tracking URI: None if all is well, one line of warning if MLflow does not answer within 5 s.

    Raises:
        ValueError: one line, for a URI that is none of http, https, sqlite and postgresql, credentials that are refused
            (401, 403), another server than MLflow's (404), or a sqlite directory that cannot be written.
    """
    scheme = urlsplit(_with_driver(tracking_uri)).scheme
    checks = {"http": _check_http, "https": _check_http, "sqlite": _check_sqlite, DRIVER: _check_postgresql}
    if scheme not in checks:
        file_store = scheme in ("", "file")
        hint = "MLflow's file store is gone, use sqlite:////path/mlflow.db" if file_store else "correct it"
        rule = "MLFLOW_TRACKING_URI must start with http, https, sqlite or postgresql"
        raise ValueError(f"{rule}, got {without_password(tracking_uri)!r}; {hint}")
    return checks[scheme](tracking_uri)


def default_tracking_uri(workspace: Storage) -> str:
    """MLFLOW_TRACKING_URI if it is set, else a sqlite file in a local workspace.

    Raises:
        ValueError: the workspace is on s3 and MLFLOW_TRACKING_URI is not set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and uri.startswith("sqlite:"):
        return f"sqlite:///{sqlite_file(uri)}"  # absolute, because the process that uses it has another directory
    if uri:
        return uri
    if not workspace.is_local:
        raise ValueError(
            f"MLFLOW_TRACKING_URI must be set when the workspace is on s3, got nothing for {workspace.uri}; "
            "set it to an MLflow server, http://host:5000"
        )
    return f"sqlite:///{workspace.uri}/mlflow.db"


def ui_command(tracking_uri: str) -> str:
    """The shell command that opens MLflow's UI, or the URL of a server."""
    if is_http(tracking_uri):
        return without_password(tracking_uri)
    if urlsplit(tracking_uri).password:
        return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --backend-store-uri {shlex.quote(_with_driver(tracking_uri))}"


def _check_http(uri: str) -> str | None:
    shown = without_password(uri)
    try:
        status = _ask(uri, "/api/2.0/mlflow/experiments/search?max_results=1")
        if status in (0, 401, 403):
            # Only MLflow's client knows all the ways to give credentials and certificates; it has the last word.
            status = _client_status(uri)
    except OSError as error:
        return f"MLflow at {shown} does not answer ({error}); the run goes on and its events wait in the workspace"
    if status in (401, 403):
        raise ValueError(
            f"MLFLOW_TRACKING_URI must accept the credentials, got {status} from {shown}; correct "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
        )
    if status == 404:
        rule = "MLFLOW_TRACKING_URI must be the address of an MLflow server"
        raise ValueError(f"{rule}, got 404 (no such page) from {shown}; correct host, port or path")
    if status != 200:
        return f"MLflow at {shown} answers {status}; the run goes on and its events wait in the workspace"
    return None


def _check_sqlite(uri: str) -> None:
    file = sqlite_file(uri)
    there = next(parent for parent in (file, *file.parents) if parent.exists())
    usable = there.is_file() if there == file else there.is_dir()
    if not usable or not os.access(there, os.W_OK):
        raise ValueError(f"MLFLOW_TRACKING_URI must name a writable sqlite file, got {uri}; name another directory")


def _check_postgresql(uri: str) -> str | None:
    import psycopg2

    shown = without_password(uri)
    try:
        psycopg2.connect(_with_driver(uri).replace(DRIVER, "postgresql", 1), connect_timeout=int(ANSWER_S)).close()
    except psycopg2.OperationalError as error:
        reason = " ".join(str(error).split())
        if re.search("authentication failed|no pg_hba.conf entry|does not exist|no password supplied", reason):
            rule = "MLFLOW_TRACKING_URI must be accepted by PostgreSQL"
            raise ValueError(f"{rule}, got {shown} ({reason}); correct user, password or database") from error
        return f"PostgreSQL at {shown} does not answer ({reason}); the run goes on and its events wait in the workspace"
    return None


def _ask(uri: str, path: str) -> int:
    """The HTTP status of a GET; 0 if only the certificate is not to our liking; OSError if there is no answer.

    Raises:
        ValueError: the server answers requests to other host names only.
    """
    parts = urlsplit(uri)
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    headers = {}
    if user and password:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    request = urllib.request.Request(address + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        if error.code == 403 and b"Invalid Host header" in error.read(1000):
            host = parts.netloc.rpartition("@")[2]
            raise ValueError(
                f"MLFLOW_TRACKING_URI must name a host that the server allows, got 403 for {host!r}; add it to the "
                f"server's --allowed-hosts ({parts.hostname},{parts.hostname}:*)"
            ) from error
        return error.code
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return 0
        raise OSError(str(error.reason)) from error


def _client_status(uri: str) -> int:
    """The HTTP status that MLflow's own client gets; OSError if it gets none."""
    client = mlflow_client(uri)
    from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS, MlflowException

    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        if isinstance(error.__context__, OSError):  # of requests: no answer at all
            raise OSError(" ".join(str(error).split())) from error
        return int(ERROR_CODE_TO_HTTP_STATUS.get(error.error_code, 500))
    return 200


def mlflow_client(uri: str) -> Any:
    """An MLflow client that gives up within seconds; repeating is our own work."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # "View run ..." for each run that ends
        "MLFLOW_LOGGING_LEVEL": "WARNING",  # it tells of every table that it makes in a new database
        **s3_environment(os.environ),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=_with_driver(uri))


def _entity(kind: str, row: Sequence[Any]) -> Any:
    from mlflow.entities import Metric as MlflowMetric
    from mlflow.entities import Param, RunTag

    if kind == "metrics":
        key, step, value, timestamp_ms = row
        return MlflowMetric(key, value, timestamp_ms, step)
    return Param(*row) if kind == "params" else RunTag(*row)


def _is_refusal(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in REFUSALS


def _merge_metrics(events: Iterable[Event]) -> Iterable[Event]:
    """The events, with the metrics of a run joined up to its next other event: MLflow is slow by the request."""
    waiting: dict[str, Event] = {}
    for event in events:
        key = event["run"]
        if event["kind"] == "metrics":
            waiting.setdefault(key, {"kind": "metrics", "run": key, "metrics": []})["metrics"] += event["metrics"]
            continue
        if key in waiting:
            yield waiting.pop(key)
        yield event
    yield from waiting.values()


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, default=str) if isinstance(value, list | tuple) else str(value)
            flat[f"{prefix}{name}"] = text if len(text) <= MAX_PARAM_CHARS else text[: MAX_PARAM_CHARS - 3] + "..."
    return flat


def _weight(event: Event) -> int:
    return len(event["metrics"]) if event["kind"] == "metrics" else 1


def _segment_weight(name: str) -> int:
    return int(name.split("-")[1])


def sqlite_file(uri: str) -> Path:
    """The file of a sqlite URI."""
    return Path(os.path.abspath(uri.removeprefix("sqlite:///").split("?")[0]))


def _with_driver(uri: str) -> str:
    """SQLAlchemy 2.1 takes `postgresql:` for psycopg 3; what we depend on is psycopg2."""
    return re.sub("^postgresql:", f"{DRIVER}:", uri)


def is_http(uri: str) -> bool:
    """Whether a tracking URI is that of a server, with a UI."""
    return uri.startswith(("http://", "https://"))


def without_password(text: str) -> str:
    """A URI, or a text with URIs in it, as it may be shown: what stands for passwords in them is starred out."""
    starred = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)  # to the last @, as a password may hold one unquoted
    return re.sub(r"([?&;](?:\w*password|token)=)[^&;\s]+", r"\1***", starred)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
