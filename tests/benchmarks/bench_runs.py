"""Whole runs of the command line: with MLflow there and away, and the quickstart by stage."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_note import ROOT, Outcome, figure, overhead

from orchestration.recipe import load

MLFLOW_AIM_PERCENT = 2.0
MLFLOW_ROUNDS = 3
QUICKSTART_AIM_S = 360.0
LIMIT_S = 1800.0
# Six arms of 800 steps, metrics five times as often as in the recipe, and no base worth mentioning.
SMALL = (
    "replicates=2",
    "base.train.steps=200",
    "base.train.log_every=10",
    "base.train.checkpoint_every=100",
    "training.steps=800",
    "training.log_every=10",
    "training.checkpoint_every=400",
)
TINY = ("base.train.steps=100", "base.train.checkpoint_every=100", "training.steps=50", "training.checkpoint_every=50")


@dataclass(frozen=True)
class Run:
    """A finished run: what it printed, how long it took from the outside, and when its stages began and ended.

    Attributes:
        wall_s: of the process.
        stage_s: seconds of all stages of a kind.
        start_up_s: from the process's start to the first stage on a worker.
        closing_s: from the last stage's end to the process's.
    """

    outcome: dict[str, Any]
    wall_s: float
    stage_s: dict[str, float]
    start_up_s: float
    closing_s: float

    @property
    def training_s(self) -> float:
        """Base and arms."""
        return self.stage_s["base"] + self.stage_s["arms"]


def mlflow(quick: bool) -> Outcome:
    """The same small run with MLflow there (sqlite), with nobody listening, and with one who never answers."""
    rounds, overrides = (1, [*_workers(), "replicates=2", *TINY]) if quick else (MLFLOW_ROUNDS, [*_workers(), *SMALL])
    runs: dict[str, list[Run]] = defaultdict(list)
    with _silent_server() as silent, _closed_port() as closed:
        places = {"there": "", "away": f"http://127.0.0.1:{closed}", "silent": f"http://127.0.0.1:{silent}"}
        for number in range(rounds):
            names = list(places)
            for name in [*names[number % 3 :], *names[: number % 3]]:  # nobody always goes first
                runs[name].append(_run("train", overrides, places[name]))
    pending = {name: [run.outcome["tracking"]["pending"] for run in of] for name, of in runs.items()}
    figures = [figure(f"{name}: training", "s", [run.training_s for run in of]) for name, of in runs.items()]
    for name in ("away", "silent"):
        longer = overhead([r.training_s for r in runs[name]], [r.training_s for r in runs["there"]])
        figures.append(figure(f"{name} over there: training", "%", longer, MLFLOW_AIM_PERCENT))
    figures += [figure(f"{name}: whole run", "s", [run.wall_s for run in of]) for name, of in runs.items()]
    for name in ("away", "silent"):
        more = [a.wall_s - b.wall_s for a, b in zip(runs[name], runs["there"], strict=True)]
        figures.append(figure(f"{name} minus there: whole run", "s", more))
    about = (
        "`mixflow train` of a small experiment, in turn: MLflow there (a sqlite file), away (nothing listens at its "
        "address) and silent (its server takes connections and never answers). Training is the stages that train, as "
        "the run itself reports them. The whole run waits for MLflow a few seconds at its start and end, however long "
        "it is; those seconds are shown as seconds."
    )
    return Outcome("mlflow", about, figures, {"recipe": "quickstart", "overrides": overrides, "pending": pending})


def quickstart(quick: bool) -> Outcome:
    """`mixflow run quickstart --json` in a fresh workspace."""
    overrides = [*_workers(), *(["replicates=2", *TINY] if quick else [])]
    run = _run("run", overrides, "")
    figures = [
        figure("whole run", "s", [run.wall_s], QUICKSTART_AIM_S),
        figure("start-up, to the first stage on a worker", "s", [run.start_up_s]),
        *(figure(f"stages: {kind}", "s", [seconds]) for kind, seconds in run.stage_s.items()),
        figure("closing, after the last stage", "s", [run.closing_s]),
    ]
    settings = {
        "overrides": overrides,
        "stages": run.outcome["stages"],
        "experiment": load("quickstart", overrides).model_dump(mode="json"),
    }
    about = "The whole quickstart, once, from nothing: imports, Ray, every stage one after another, report, MLflow."
    return Outcome("quickstart", about, figures, settings)


def _workers() -> list[str]:
    """The recipe's two workers, or one where there is one core."""
    return [] if len(os.sched_getaffinity(0)) > 1 else ["cluster.num_workers=1"]


def run_command(
    arguments: Sequence[str], workspace: Path, overrides: Sequence[str], tracking_uri: str = ""
) -> tuple[dict[str, Any], float]:
    """The JSON document of a `mixflow` command in a workspace, and its seconds.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    env |= {"MIXFLOW_WORKSPACE": str(workspace), **({"MLFLOW_TRACKING_URI": tracking_uri} if tracking_uri else {})}
    command = [sys.executable, "-m", "orchestration", *arguments, "--json", *(f"--set={one}" for one in overrides)]
    start = time.monotonic()
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout), time.monotonic() - start


def _run(verb: str, overrides: list[str], tracking_uri: str) -> Run:
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        began = time.time()
        outcome, wall_s = run_command([verb, "quickstart"], Path(scratch, "workspace"), overrides, tracking_uri)
        stage_s: dict[str, float] = defaultdict(float)
        for stage in outcome["stages"]:
            stage_s[stage["name"].split("/")[0]] += stage["seconds"]
        # A stage ends when its manifest is written.
        ended = {path: path.stat().st_mtime for path in Path(scratch, "workspace").glob("*/*/manifest.json")}
        first = next(end for path, end in ended.items() if path.parts[-3] == "base") - stage_s["base"]
        return Run(outcome, wall_s, dict(stage_s), first - began, began + wall_s - max(ended.values()))


@contextmanager
def _silent_server() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:  # closed: the benchmark is over
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


@contextmanager
def _closed_port() -> Iterator[int]:
    """A port that refuses connections: it is bound, so that nobody else takes it, and nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])
