"""Sweeps: what a trial costs beside the same run launched by itself, and how soon each search finds an optimum."""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench_note import Outcome, figure
from bench_runs import run_command

from orchestration.recipe import load
from orchestration.space import Search, Tried, parse_space, suggest
from orchestration.sweep import scheduler_of

OVERHEAD_AIM_S = 5.0
STANDARD = "standard: {mixture: {time_law: uniform, gamma: 0}}"
RUNS = (
    "cluster.num_workers=1",
    "cluster.cpus_per_worker=2",
    "replicates=2",
    "base.train.steps=200",
    "base.train.checkpoint_every=200",
    "training.steps=200",
    "training.log_every=50",
    "training.checkpoint_every=100",
    "evaluation.num_samples=500",
    "evaluation.slow_flow_samples=50",
    "sweep={objective: fd_digits/euler4/s1}",
)
GAMMAS = (0.2, 0.4, 0.6, 0.8)

SPACE = {"mixture.gamma": "uniform(0.2,1.0)", "training.learning_rate": "loguniform(1e-4,1e-2)"}
RUNGS, MOST_TRIALS, SWEEPS, GOOD_ENOUGH, NOISE, CROSSING = 4, 60, 40, 0.02, 0.02, 0.5
METHODS: dict[str, Search] = {"random": "random", "Optuna": "optuna"}


def search(quick: bool) -> Outcome:
    """Random search and Optuna's TPE, each first in first out and under ASHA, on functions with a known optimum."""
    sweeps, figures, missed = 3 if quick else SWEEPS, [], {}
    for curves, crossing in (("in order", 0.0), ("crossing", CROSSING)):
        for name, method in METHODS.items():
            for scheduler in ("fifo", "asha"):
                spent = [_trials_to_find(seed, method, scheduler, crossing) for seed in range(sweeps)]
                label = f"{name}, {scheduler.upper()}, curves {curves}"
                missed[label] = sum(value == math.inf for value in spent)
                # A sweep that never found it is counted with all that it spent: a lower bound.
                figures.append(figure(label, "trials", [min(value, MOST_TRIALS) for value in spent]))
    about = (
        f"{sweeps} planted functions of gamma and learning rate: a bowl of depth 1, noise of {NOISE} on each value, "
        f"{RUNGS} rungs. Where curves cross, a low learning rate is behind by up to {CROSSING} at first, whatever it "
        f"comes to. Counted is the training spent, in whole trials, until a finished one lay within {GOOD_ENOUGH} of "
        f"the optimum; at most {MOST_TRIALS} trials, one at a time. Nothing is trained: asked and told is what a sweep "
        "asks and tells."
    )
    return Outcome("search", about, figures, {"space": SPACE, "never found": missed})


def _trials_to_find(seed: int, method: Search, scheduler: str, crossing: float) -> float:
    """Whole trials that a search spends until one that has finished is good enough; infinite if none is."""
    planted = random.Random(f"planted {seed}")
    gamma, rate = planted.uniform(0.2, 1.0), 10 ** planted.uniform(-4, -2)
    experiment = load("quickstart", [f"sweep={{scheduler: {scheduler}, reduction_factor: 2, grace_steps: 1}}"])
    judge: Any = scheduler_of(experiment, [], RUNGS)
    laws, tried, spent = parse_space(SPACE), list[Tried](), 0
    for number in range(MOST_TRIALS):
        params = suggest(laws, method, seed, number, tried, lower_is_better=True)
        assert params is not None
        far = math.log10(params["training.learning_rate"] / rate) / 2
        depth = ((params["mixture.gamma"] - gamma) / 0.8) ** 2 + far**2
        trial, goes_on = SimpleNamespace(trial_id=f"t{number}"), True
        if scheduler == "asha":
            judge.on_trial_add(None, trial)
        for step in range(1, RUNGS + 1):
            spent += 1
            behind = crossing * (1 - step / RUNGS) * (-1 - math.log10(params["training.learning_rate"]) / 2)
            value = depth + behind + random.Random(f"noise {seed}/{number}/{step}").gauss(0, NOISE)
            if scheduler == "asha" and step < RUNGS:
                goes_on = judge.on_trial_result(None, trial, {"step": step, "objective": value}) == "CONTINUE"
                if not goes_on:
                    break
        tried.append(Tried(number, params, value) if goes_on else Tried(number, params, pruned=(step, value)))
        if goes_on and depth <= GOOD_ENOUGH:
            return spent / RUNGS
    return math.inf


def sweep(quick: bool) -> Outcome:
    """What a trial costs beyond its own training and measuring, beside arms of one run and a command for each."""
    gammas = GAMMAS[:2] if quick else GAMMAS
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        swept, arms, each = (Path(scratch, name) for name in ("sweep", "arms", "each"))
        space = f"--space=mixture.gamma=grid({','.join(map(str, gammas))})"
        run_command(["sweep", "quickstart", space], swept, RUNS)
        run_command(["train", "quickstart", _arms(*gammas)], arms, RUNS)
        beyond = []
        for gamma in gammas:  # all of them in one workspace, so that the base is made by the first alone
            before = set(each.glob("arms/*"))
            _, whole = run_command(["train", "quickstart", _arms(gamma)], each, RUNS)
            made = [path for path in each.glob("arms/*/manifest.json") if path.parent not in before]
            beyond.append((whole - sum(map(_own_s, made))) / len(made))
        trial = _between(swept, "trials")
        apart = [value - statistics.median(beyond[1:]) for value in trial]
        figures = [
            figure("a trial of a sweep, beyond its own stage", "s", trial),
            figure("an arm of one run, beyond its own stage", "s", _between(arms, "arms")),
            figure("an arm by a command of its own, beyond its own stage", "s", beyond[1:]),
            figure("a trial less an arm by a command of its own", "s", apart, OVERHEAD_AIM_S),
        ]
    about = (
        "The same trainings on one worker of two CPUs, as trials of a sweep, as arms of one run, and by a command for "
        "each. A trial's own stage is its training and the measuring of its objective, as its worker timed them; what "
        "goes beyond it is the time from one result to the next, less that. The first of each is left out."
    )
    return Outcome("sweep", about, figures, {"settings": RUNS, "gammas": gammas})


def _arms(*gammas: float) -> str:
    """Standard training and slowed mixtures, of which no verdict is asked and which need no control of their own."""
    arms = [STANDARD, *(f"gamma-{gamma}: {{judged: false, mixture: {{gamma: {gamma}}}}}" for gamma in gammas)]
    return f"--set=arms={{{', '.join(arms)}}}"


def _own_s(manifest: Path) -> float:
    return float(json.loads(manifest.read_text())["meta"]["seconds"])


def _between(workspace: Path, kind: str) -> list[float]:
    """Seconds between one result of a kind and the next, less the later one's own."""
    made = sorted(workspace.glob(f"{kind}/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return [b.stat().st_mtime - a.stat().st_mtime - _own_s(b) for a, b in pairwise(made)]
