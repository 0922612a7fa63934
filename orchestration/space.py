"""A sweep's search space, and what is tried next: pure functions of the seed, the trial's number and what is known.

So a sweep that was killed, or is extended, goes on with the trials that it would have had anyway.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Any, Literal

LAWS = ("uniform(a,b)", "loguniform(a,b)", "randint(a,b)", "choice(a,b,...)", "grid(a,b,...)")
RANGES, LISTS = ("uniform", "loguniform", "randint"), ("choice", "grid")
# Trials have these of their own. The rest is of the data, the base or the evaluation, which they share.
SECTIONS = ("mixture", "training", "corrective")
SHARED = ("training.global_batch_size", "training.num_shards")  # they decide the order of the data and the noise
STARTUP_TRIALS = 5  # that Optuna's sampler draws at random before it models anything
MOST_CORNERS = 256
WITHIN = (0.146, 0.382, 0.618, 0.854)  # of a range: where a whole number or a multiple is asked for, these are none

Search = Literal["random", "grid", "optuna"]
Params = Mapping[str, Any]


@dataclass(frozen=True)
class Law:
    """The law of one key.

    Attributes:
        kind: `uniform` and `loguniform` over [a, b], `randint` over the integers a to b, both included; `choice` among
            values; `grid`, all of them.
        values: a and b, or the values.
    """

    kind: str
    values: tuple[Any, ...]

    @property
    def points(self) -> Sequence[Any] | None:
        """All values, None of a continuous range."""
        if self.kind == "randint":
            return range(self.values[0], self.values[1] + 1)
        return self.values if self.kind in LISTS else None

    def at(self, u: float) -> Any:
        """The value at u in [0, 1) of the law's distribution."""
        points = self.points
        if points is not None:
            return points[int(u * len(points))]
        low, high = self.values
        if self.kind == "loguniform":
            return min(high, max(low, math.exp(math.log(low) + u * (math.log(high) - math.log(low)))))
        return min(high, low + u * (high - low))

    def holds(self, value: Any) -> bool:
        """Whether it could have drawn the value."""
        if self.kind in LISTS:
            return any(value == point and type(value) is type(point) for point in self.values)
        if self.kind == "randint" and type(value) is not int:
            return False
        return isinstance(value, int | float) and bool(self.values[0] <= value <= self.values[1])


@dataclass(frozen=True)
class Tried:
    """A trial that was begun.

    Attributes:
        number: its place in the order.
        params: by key.
        objective: once it has finished.
        pruned: where a scheduler stopped it, and its objective there.
        diverged: whether its numbers were not finite.
    """

    number: int
    params: Params
    objective: float | None = None
    pruned: tuple[int, float] | None = None
    diverged: bool = False


def parse_space(space: Mapping[str, str]) -> dict[str, Law]:
    """The laws of `dotted.key: law(...)`; `mixflow_gamma` is another name of mixture.gamma.

    Raises:
        ValueError: one line naming the key, what is wrong with it and the mend.
    """
    alias, own = "mixflow_gamma", "mixture.gamma"
    if alias in space and own in space:
        raise ValueError(f"space must not have {alias} beside {own}, which it stands for; remove one")
    return {(own if key == alias else key): _parse(own if key == alias else key, text) for key, text in space.items()}


def holds(laws: Mapping[str, Law], params: Params) -> bool:
    """Whether a space could have drawn these parameters."""
    return set(params) == set(laws) and all(laws[key].holds(value) for key, value in params.items())


def _parse(key: str, text: str) -> Law:
    section, _, rest = key.partition(".")
    if section not in SECTIONS or not rest:
        raise ValueError(
            f"space must have keys of {', '.join(SECTIONS)}, got {key!r}; trials share data, base and evaluation"
        )
    if key in SHARED:
        raise ValueError(f"space must not have {key}, got {text!r}; trials share the order of the data and the noise")
    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if not match or match[1] not in (*RANGES, *LISTS):
        raise ValueError(f"space.{key} must be one of {', '.join(LAWS)}, got {text!r}; correct it")
    kind, words = match[1], [word.strip() for word in match[2].split(",")]
    values = tuple(_value(word) for word in words)
    if "" in words or len(set(values)) < len(values):
        raise ValueError(f"space.{key} must have values that differ, got {text!r}; correct it")
    if kind in RANGES:
        _check_range(key, kind, values, text)
    return Law(kind, values)


def _check_range(key: str, kind: str, values: Sequence[Any], text: str) -> None:
    number = int if kind == "randint" else (int | float)
    numbers = [v for v in values if isinstance(v, number) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) != 2 or len(values) != 2 or numbers[0] >= numbers[1]:
        what = "integers" if kind == "randint" else "numbers"
        raise ValueError(f"space.{key} must have two {what}, the lower one first, got {text!r}; correct it")
    if kind == "loguniform" and numbers[0] <= 0:
        raise ValueError(f"space.{key} must be above 0 for loguniform, got {text!r}; use uniform, or raise it")


def _value(word: str) -> Any:
    if word in ("true", "false"):
        return word == "true"
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word.strip("'\"")


def search_of(laws: Mapping[str, Law], search: Search | None) -> Search:
    """The search that is meant: what is named, else the grid of grids, else random.

    Raises:
        ValueError: the laws and the search do not fit.
    """
    grids = [key for key, law in laws.items() if law.kind == "grid"]
    found = search or ("grid" if grids else "random")
    if found == "grid":
        ranges = [key for key, law in laws.items() if law.points is None]
        if ranges:
            raise ValueError(f"space.{ranges[0]} must be a grid, choice or randint for grid search; list its values")
    elif grids:
        raise ValueError(f"space.{grids[0]} must not be a grid for {found} search; call it choice, or search the grid")
    return found


def is_finite(laws: Mapping[str, Law]) -> bool:
    """Whether there is a space and it has so many points."""
    return bool(laws) and all(law.points is not None for law in laws.values())


def is_exhausted(laws: Mapping[str, Law], tried: Iterable[Params]) -> bool:
    """Whether a space of points has none that was not tried."""
    if not is_finite(laws):
        return False
    return len({tuple(params[key] for key in laws) for params in tried if holds(laws, params)}) >= grid_size(laws)


def grid_size(laws: Mapping[str, Law]) -> int:
    """Points of the grid of finite laws."""
    return math.prod(len(law.points or ()) for law in laws.values())


def samples_of(laws: Mapping[str, Law]) -> list[dict[str, Any]]:
    """Points that must be valid runs: all combinations of ends, and what lies within each range.

    Of many keys, each end once with the first and the last ends of all others.
    """
    ends = {key: law.values for key, law in laws.items()}
    first, last = ({key: values[place] for key, values in ends.items()} for place in (0, -1))
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        found = [dict(zip(ends, values, strict=True)) for values in product(*ends.values())]
    else:
        found = [{**others, key: value} for others in (first, last) for key, of in ends.items() for value in of]
    return found + [{**first, key: law.at(u)} for key, law in laws.items() if law.kind in RANGES for u in WITHIN]


def suggest(
    laws: Mapping[str, Law], search: Search, seed: int, number: int, tried: Sequence[Tried], *, lower_is_better: bool
) -> dict[str, Any] | None:
    """The parameters of trial `number`; None where a space of points has no more.

    Args:
        laws: by key.
        search: `grid` goes on with the first point that was not tried; `random` depends on seed and number, and draws
            again what was tried; `optuna` asks its TPE sampler, told of what was finished or pruned, in the order of
            the numbers, so that with several trials at once it depends on which had ended; what it asks for again is
            drawn at random instead.
        seed: of the sweep.
        number: of the trial, from 0.
        tried: every trial that was begun.
        lower_is_better: of the objective.
    """
    if search == "grid":
        begun = [dict(trial.params) for trial in tried if holds(laws, trial.params)]
        points = product(*(law.points or () for law in laws.values()))
        return next((point for p in points if (point := dict(zip(laws, p, strict=True))) not in begun), None)
    # Trials share seed and noise: of a space of points, one that was tried would say the same again.
    begun = [dict(trial.params) for trial in tried if holds(laws, trial.params)] if is_finite(laws) else []
    if is_exhausted(laws, begun):
        return None
    found = _ask_optuna(laws, seed, number, tried, lower_is_better) if search == "optuna" else None
    draws = (f"{number}/{again}" if again else f"{number}" for again in count())
    while found is None or found in begun:
        draw = next(draws)
        found = {key: law.at(random.Random(f"{seed}/{key}/{draw}").random()) for key, law in laws.items()}
    return found


def _ask_optuna(
    laws: Mapping[str, Law], seed: int, number: int, tried: Sequence[Tried], lower_is_better: bool
) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(law) for key, law in laws.items()}
    own = int.from_bytes(hashlib.sha256(f"{seed}/optuna/{number}".encode()).digest()[:4], "little")
    sampler = optuna.samplers.TPESampler(seed=own, n_startup_trials=STARTUP_TRIALS)
    study = optuna.create_study(direction="minimize" if lower_is_better else "maximize", sampler=sampler)
    for trial in sorted(tried, key=lambda trial: trial.number):
        fits = holds(laws, trial.params)  # of a sweep that was extended
        about: dict[str, Any] = {"params": dict(trial.params), "distributions": distributions}
        if fits and trial.objective is not None:
            study.add_trial(optuna.trial.create_trial(**about, value=trial.objective))
        elif fits and trial.pruned:  # worse than all that went further: without it, the same would be asked for again
            state, (step, value) = optuna.trial.TrialState.PRUNED, trial.pruned
            study.add_trial(optuna.trial.create_trial(**about, state=state, intermediate_values={step: value}))
        elif fits and trial.diverged:  # without a value the sampler takes it for worse than all others
            study.add_trial(optuna.trial.create_trial(**about, state=optuna.trial.TrialState.PRUNED))
    return dict(study.ask(distributions).params)


def _distribution(law: Law) -> Any:
    import optuna

    if law.kind in LISTS:
        return optuna.distributions.CategoricalDistribution(law.values)
    if law.kind == "randint":
        return optuna.distributions.IntDistribution(*law.values)
    low, high = law.values
    return optuna.distributions.FloatDistribution(low, high, log=law.kind == "loguniform")
