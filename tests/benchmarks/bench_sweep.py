"""Sweeps: how soon each search finds an optimum."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

from bench_note import Outcome, figure

from orchestration.recipe import load
from orchestration.space import Search, Tried, parse_space, suggest
from orchestration.sweep import scheduler_of

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
