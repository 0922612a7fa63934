"""The single MLflow writer, with its durable spool.

MLflow never blocks and never kills a run. What is handed to a `Tracker` becomes durable in the workspace first (the
spool: numbered JSON-lines segments) and is sent from there by another thread, in batches, oldest first; a segment is
deleted when MLflow has acknowledged all of it, so an empty spool means that everything arrived. Each (run, metric key,
step) arrives once: what may have reached MLflow without an answer is sent again unchanged, which MLflow stores once,
and a step that MLflow already holds is skipped. One process owns a spool at a time.

With tracked.py, which reads, and mlflow_server.py, the only file that imports mlflow, where it is used (3 s).
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestration.mlflow_server import ask, is_http, mlflow_client, without_password
from orchestration.spool import Batch, Event, Spool, weight
from orchestration.storage import Storage

log = logging.getLogger(__name__)

RUN_KEY = "mixflow.run_key"  # the tag that says which of our runs an MLflow run is
CLAIMED = "mixflow.claimed"  # set once we know the run's id; a run without it stems from a request that got no answer
CONFLICTS = "mixflow.param_conflicts"

SPOOL_EVERY_S = 1.0  # at most this much is lost to a kill between two calls of `flush`
RETRY_S = 2.0
STALLED_S = 5.0  # drain waits this long for MLflow to make progress again
HOPELESS_S = 60.0  # MLflow fails this one event for that long, but answers otherwise: set it aside
BATCH_EVENTS = 5000
# MLflow's own limits of one request, and of the length of a parameter.
AT_ONCE = {"metrics": 1000, "params": 100, "tags": 100}
MAX_PARAM_CHARS = 5999
# MLflow's answers that repeating the request cannot change. Anything else may be an outage, whose events must be kept.
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}
STATUSES = ("FINISHED", "FAILED", "KILLED")


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
        self._spool = Spool(workspace, spool)
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
        start = time.monotonic()
        # A workspace that is away is waited for no longer than MLflow.
        keeping = threading.Thread(target=self._keep, daemon=True, name="tracking-drain")
        keeping.start()
        keeping.join(min(timeout_s, threading.TIMEOUT_MAX))
        while self._spool.pending and time.monotonic() - start < timeout_s:
            idle = time.monotonic() - max(start, self._sender.moved_at)
            if self._last_error is not None and idle > STALLED_S:
                break
            time.sleep(0.05)
        return self._spool.pending

    def _keep(self) -> None:
        try:
            self.flush()
        except OSError as error:
            log.warning("tracking events wait in memory, the workspace cannot be written: %s", error)

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
        batch: Batch | None = None
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

    def _arrived(self, batch: Batch, rejected: Sequence[Event]) -> None:
        self._rejected += sum(map(weight, rejected))
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
    store = Spool(workspace, spool)
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


class _Rejected(Exception):
    """MLflow will never take this event; the message says why."""


@dataclass
class _Run:
    key: str
    run_id: str
    stored: set[str] = field(default_factory=set)  # metric keys that MLflow held when we met the run
    steps: dict[str, set[int]] = field(default_factory=dict)  # by metric key, once read: the steps that MLflow holds
    ended: tuple[str, int] | None = None  # status and time of the end that it had, as long as nothing new is measured


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
        if is_http(self._uri) and ask(self._uri, "/health") >= 500:
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
                known.ended = run.info.status, run.info.end_time
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
        if fresh:
            run.ended = None
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
        status, time_ms = event["status"], event["time"]
        if run.ended and run.ended[0] == status:  # told again, also after --force, where no step is new
            time_ms = run.ended[1]
        self._call(f"end {run.key}", self._client.set_terminated, run.run_id, status, time_ms)
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


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
