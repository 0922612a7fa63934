"""Takes MLflow away while runs are tracked, and compares what it holds in the end with what was handed to the tracker.

    python tests/benchmarks/mlflow_campaign.py --rounds 3

A round of a case is one experiment: a parent run and two runs below it, of a random length, log metrics, tags and an
artifact through one `Tracker` while something happens to a real MLflow server on a real PostgreSQL. It passes when

- no call of the tracker raised anything (`slowest_call_ms` is the longest that one took),
- MLflow, asked without any fault, holds of each run exactly the metrics (key, step, value, time), parameters, parent
  and artifact that were handed over, no run twice, and none that is still RUNNING,
- nothing is left in the spool and nothing was set aside.

The run does not wait for MLflow longer than `mixflow run` does; what is not there by then is sent by `replay`, as
`mixflow replay` would (`replayed` events). `caught_up_s` is how long delivery took from the end of the run or, where
the fault ended later, from that. Every case is one JSON line in the result file; a campaign that was stopped goes on
after the lines that are there. How much slower training is meanwhile is measured by `run.py --only mlflow`.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "servers"))
sys.path.append(str(Path(__file__).parents[1] / "orchestration"))
from campaigns import append_result, read_results
from mlflow_servers import MlflowServer, Postgresql
from s3_servers import Control, fault_proxy

from orchestration.mlflow_server import mlflow_client
from orchestration.storage import open_storage
from orchestration.tracking import Metric, Tracker, replay

RESULTS = Path(__file__).parent / "results" / "mlflow_campaign.jsonl"
SPOOL = "tracking/experiment"
EVERY_S = 0.01  # a step of the runs
KEYS = ("loss", "gradient_norm", "images_per_s")
DRAIN_S = 60.0
PROXIED: dict[str, dict[str, Any]] = {
    "500": {"mode": "http500"},
    "503": {"mode": "http503"},
    "429": {"mode": "http429"},
    "reset": {"mode": "reset"},
    "lost answers": {"mode": "lost"},
    "30 s a call": {"mode": "late"},
    "black hole": {"mode": "blackhole"},
}
Say = Callable[..., Any]


@dataclass
class Servers:
    """MLflow on PostgreSQL, and the proxy before it that trackers talk to."""

    database: Postgresql
    mlflow: MlflowServer
    uri: str
    control: Control

    def mend(self) -> None:
        """Everything runs, and nothing is broken on the way."""
        self.control(mode="ok")
        if not self.database.runs:
            self.database.start()
        self.mlflow.start()


@dataclass(frozen=True)
class Fault:
    """What breaks when: `begins` and `ends` are parts of the run's length; after its end, `ends` None is never."""

    name: str
    break_it: Callable[[Servers], object]
    begins: float
    ends: float | None


def faults() -> list[Fault]:
    """All cases."""
    away = [
        Fault("away at the start", lambda servers: servers.mlflow.kill(), 0, 0.5),
        Fault("killed in the middle", lambda servers: servers.mlflow.kill(), 0.3, 0.7),
        Fault("away at the end", lambda servers: servers.mlflow.kill(), 0.8, None),
        Fault("away for ever", lambda servers: servers.mlflow.kill(), 0, None),
        Fault("stopped in the middle", lambda servers: servers.mlflow.signal(signal.SIGSTOP), 0.3, 0.7),
        Fault("database restarted", restart, 0.5, 0.5),
        Fault("database away", lambda servers: servers.database.stop(), 0.3, 0.7),
    ]
    return away + [Fault(name, partial(proxied, how=how), 0.3, 0.7) for name, how in PROXIED.items()]


def restart(servers: Servers) -> None:
    servers.database.stop()
    servers.database.start()


def proxied(servers: Servers, how: dict[str, Any]) -> None:
    servers.control(**how)


@contextmanager
def broken(fault: Fault, length_s: float, servers: Servers) -> Iterator[threading.Thread]:
    """Breaks and mends in a thread, at the fault's times of a run that begins now and takes `length_s`."""

    def play() -> None:
        if fault.begins:
            time.sleep(fault.begins * length_s)
            fault.break_it(servers)
        if fault.ends is not None:
            time.sleep((fault.ends - fault.begins) * length_s)
            servers.mend()

    if not fault.begins:
        fault.break_it(servers)
    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


class Handed:
    """What one experiment hands to the tracker, kept beside it as the truth."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.slowest_s = 0.0
        self.metrics: dict[str, set[tuple[str, int, float, int]]] = {}
        self.params: dict[str, dict[str, str]] = {}
        self.parents: dict[str, str | None] = {}

    def timed(self, call: Say, *arguments: Any, **named: Any) -> None:
        start = time.monotonic()
        call(*arguments, **named)
        self.slowest_s = max(self.slowest_s, time.monotonic() - start)

    def begin(self, run: str, parent: str | None, seed: int) -> None:
        self.metrics[run], self.params[run], self.parents[run] = set(), {"seed": str(seed)}, parent
        self.timed(self.tracker.start_run, run, run, parent=parent, params={"seed": seed})

    def step(self, run: str, step: int, numbers: random.Random) -> None:
        now = int(time.time() * 1000)
        rows = [(key, step, numbers.random(), now) for key in KEYS]
        self.metrics[run].update(rows)
        self.timed(self.tracker.log, run, [Metric(*row) for row in rows])


def track(tracker: Tracker, seed: int, length_s: float) -> Handed:
    """The runs of one experiment, for `length_s` seconds."""
    numbers, handed = random.Random(seed), Handed(tracker)
    end = time.monotonic() + length_s
    handed.begin("all", None, seed)
    for name, until in (("first", end - length_s / 2), ("second", end)):
        handed.begin(name, "all", seed)
        step = 0
        while time.monotonic() < until:
            handed.step(name, step, numbers)
            step += 1
            time.sleep(EVERY_S)
        handed.timed(tracker.artifact, name, "grid.txt", "grids")
        handed.timed(tracker.end_run, name, "FINISHED")
    handed.timed(tracker.end_run, "all", "FINISHED")
    return handed


def wrong(uri: str, experiment: str, handed: Handed) -> list[str]:
    """What MLflow holds otherwise than it was handed over."""
    client = mlflow_client(uri)
    (found,) = [entry for entry in client.search_experiments() if entry.name == experiment]
    runs = list(client.search_runs([found.experiment_id]))
    names = sorted(run.info.run_name for run in runs)
    if names != sorted(handed.metrics):
        return [f"runs {', '.join(names)}"]
    ids, problems = {run.info.run_name: run.info.run_id for run in runs}, []
    for run in runs:
        name = run.info.run_name
        stored = [row for key in run.data.metrics for row in client.get_metric_history(run.info.run_id, key)]
        rows = [(row.key, row.step, row.value, row.timestamp) for row in stored]
        files = [file.path for file in client.list_artifacts(run.info.run_id, "grids")]
        parent = handed.parents[name]
        wanted = {
            "metrics": sorted(rows) == sorted(handed.metrics[name]),
            "params": run.data.params == handed.params[name],
            "parent": run.data.tags.get("mlflow.parentRunId") == (ids[parent] if parent else None),
            "status": run.info.status == "FINISHED",
            "artifacts": files == (["grids/grid.txt"] if parent else []),
        }
        problems += [f"{what} of {name}" for what, right in wanted.items() if not right]
    return problems


def play(fault: Fault, number: int, length_s: float, servers: Servers, scratch: Path) -> dict[str, Any]:
    """One round of a case."""
    experiment = f"{fault.name}, round {number}, {time.time():.0f}"
    workspace = open_storage(tempfile.mkdtemp(dir=scratch))
    workspace.put("grid.txt", b"a grid of images")
    servers.mend()
    with broken(fault, length_s, servers) as thread:
        tracker = Tracker(workspace, servers.uri, experiment, SPOOL)
        handed = track(tracker, number, length_s)
        if fault.ends is not None:
            thread.join()
        ended = time.monotonic()
        tracker.drain(DRAIN_S)
        tracker.close()
    servers.mend()
    ended = ended if fault.ends is not None else time.monotonic()
    done = replay(workspace, servers.uri, SPOOL)
    caught_up_s = time.monotonic() - ended
    problems = wrong(servers.mlflow.uri, experiment, handed)
    left = [path for path in workspace.list(SPOOL) if not path.endswith("/spool.json")]
    problems += [f"{path} is left" for path in left]
    return {
        "values": sum(map(len, handed.metrics.values())),
        "slowest_call_ms": round(handed.slowest_s * 1000, 2),
        "replayed": done.sent,
        "caught_up_s": round(caught_up_s, 2),
        "problems": problems,
        "passed": not problems,
    }


def campaign(options: argparse.Namespace, servers: Servers, scratch: Path) -> list[dict[str, Any]]:
    results = read_results(options.results)
    done = {(entry["case"], entry["round"]) for entry in results}
    for number in range(options.rounds):
        for fault in faults():
            if (fault.name, number) in done or not re.match(options.only, fault.name):
                continue
            length_s = options.seconds * random.Random(f"{fault.name} {number}").uniform(0.7, 1.3)
            found = play(fault, number, length_s, servers, scratch)
            results.append({"case": fault.name, "round": number, "run_s": round(length_s, 1), **found})
            append_result(options.results, results[-1])
            print(json.dumps(results[-1]), flush=True)
    return results


def main() -> int:
    """Command line; 1 if any case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="how long a round's runs take, give or take 30 %%")
    parser.add_argument("--only", default="", help="a regular expression that the names of cases begin with")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the servers are ended too
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixflow-mlflow-")))
        database = Postgresql()
        stack.callback(database.remove)
        database.start()
        mlflow = MlflowServer(database.uri, scratch)
        stack.callback(mlflow.kill)
        mlflow.start()
        endpoint, control = stack.enter_context(fault_proxy(mlflow.uri))
        results = campaign(options, Servers(database, mlflow, endpoint, control), scratch)
    passed = sum(entry["passed"] for entry in results)
    print(f"{passed} of {len(results)} passed; slowest call {max(entry['slowest_call_ms'] for entry in results):g} ms")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
