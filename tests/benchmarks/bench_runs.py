"""Whole runs of the command line: the quickstart by stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_note import ROOT, Outcome, figure

from orchestration.recipe import load

QUICKSTART_AIM_S = 360.0
LIMIT_S = 1800.0
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


def quickstart(quick: bool) -> Outcome:
    """`mixflow run quickstart --json` in a fresh workspace."""
    overrides = [*_workers(), *(["replicates=2", *TINY] if quick else [])]
    run = _run("run", overrides)
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


def run_command(arguments: Sequence[str], workspace: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], float]:
    """The JSON document of a `mixflow` command in a workspace, and its seconds.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    env |= {"MIXFLOW_WORKSPACE": str(workspace)}
    command = [sys.executable, "-m", "orchestration", *arguments, "--json", *(f"--set={one}" for one in overrides)]
    start = time.monotonic()
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout), time.monotonic() - start


def _run(verb: str, overrides: list[str]) -> Run:
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        began = time.time()
        outcome, wall_s = run_command([verb, "quickstart"], Path(scratch, "workspace"), overrides)
        stage_s: dict[str, float] = defaultdict(float)
        for stage in outcome["stages"]:
            stage_s[stage["name"].split("/")[0]] += stage["seconds"]
        # A stage ends when its manifest is written.
        ended = {path: path.stat().st_mtime for path in Path(scratch, "workspace").glob("*/*/manifest.json")}
        first = next(end for path, end in ended.items() if path.parts[-3] == "base") - stage_s["base"]
        return Run(outcome, wall_s, dict(stage_s), first - began, began + wall_s - max(ended.values()))
