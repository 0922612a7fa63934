"""Intervals and variation of what was measured with several seeds, and how many seeds an effect asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MOST_PAIRS = 1000  # as many replicates as an experiment may have


@dataclass(frozen=True)
class Interval:
    """A mean over n independent values with its confidence interval [low, high]; sd is their standard deviation."""

    mean: float
    low: float
    high: float
    sd: float
    n: int


def student_interval(values: Sequence[float], *, confidence: float = 0.95, least_sd: float = 0.0) -> Interval:
    """Student's t interval of the mean of independent values, for instance paired differences between two arms.

    Args:
        values: at least two.
        confidence: of the interval.
        least_sd: what their standard deviation is taken as at least. Values that move in steps, such as shares of N
            images, may all be equal by chance; without it the interval would then be a point.

    Raises:
        ValueError: fewer than two values, from which no interval can be computed.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"values must number at least 2 for an interval, got {n}; run more replicates")
    mean = _mean(values)
    sd = max(math.sqrt(_squares(values) / (n - 1)), least_sd)
    half = student_quantile((1 + confidence) / 2, n - 1) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def nested_interval(values: Sequence[Sequence[float]], *, confidence: float = 0.95, least_sd: float = 0.0) -> Interval:
    """Student's t interval of paired differences, `values[b][k]` that of base b and training seed k.

    Seeds of one base share the base's luck, so with several bases the independent values are the bases' means, each
    counted once however many seeds it has; `n` is their number. With one base they are its seeds, and the interval
    speaks of that base alone. `least_sd` is that of `student_interval`.

    Raises:
        ValueError: no base, a base without seeds, or one base with one seed.
    """
    _require_seeds(values)
    means = values[0] if len(values) == 1 else [_mean(seeds) for seeds in values]
    return student_interval(means, confidence=confidence, least_sd=least_sd)


def ratio_interval(a: Tensor, b: Tensor, *, confidence: float = 0.95) -> Interval:
    """Interval of E[a] / E[b] from independent pairs (a_i, b_i), each (n,), b's mean above 0, by the delta method.

    The error of the ratio of means r is, to first order, the mean of (a_i - r b_i) / mean(b), whose Student interval is
    put round r: a quantity that both share, such as an image's contrast, then cancels.

    Raises:
        ValueError: fewer than two pairs.
    """
    a, b = a.double(), b.double()
    ratio = float(a.mean() / b.mean())
    error = student_interval(((a - ratio * b) / b.mean()).tolist(), confidence=confidence)
    return Interval(ratio, ratio + error.low, ratio + error.high, error.sd, error.n)


def share_interval(count: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a probability of which `count` of n independent trials came true; 95 % at first.

    Unlike the normal interval it is not a point at count = 0 or n, from which nothing so certain follows.

    Raises:
        ValueError: count does not lie in [0, n], or n is 0.
    """
    if not 0 <= count <= n or n == 0:
        raise ValueError(f"count must lie in [0, n] with n above 0, got {count} of {n}")
    z = _normal_quantile((1 + confidence) / 2)
    middle = (count + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(count * (n - count) / n + z**2 / 4)
    return middle - half, middle + half


def quantile_ranks(n: int, level: float, *, confidence: float = 0.95) -> tuple[int | None, int | None]:
    """Which of n sorted independent values bound the law's quantile, whatever the law: places from 0, low and high.

    The number of values below the quantile is binomial, so P(value[low] > quantile) and P(value[high] < quantile) are
    each at most (1 - confidence) / 2. None where n is too small for such a bound: the 5 % quantile has a lower one from
    n = 72 on.

    Args:
        n: values, at least 1.
        level: of the quantile, in (0, 1).
        confidence: of the interval, in (0, 1).
    """
    k = torch.arange(n + 1, dtype=torch.float64)
    choices = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    below = (choices + k * math.log(level) + (n - k) * math.log1p(-level)).exp().cumsum(0)[:-1]
    miss = (1 - confidence) / 2
    num_low, num_short = int((below <= miss).sum()), int((below < 1 - miss).sum())
    return num_low - 1 if num_low else None, num_short if num_short < n else None


def seed_variance(values: Sequence[Sequence[float]]) -> float:
    """Variance between training seeds of one base, pooled over bases; `values[b][k]` is that of base b and seed k.

    The mean square within of a one-way analysis of variance; bases may differ in their number of seeds.

    Raises:
        ValueError: no base, a base without seeds, or only bases with one seed.
    """
    _require_seeds(values)
    bases, total = len(values), sum(map(len, values))
    if total == bases:
        raise ValueError("values must have two seeds in one base or more, got one in each; run more replicates")
    return math.fsum(map(_squares, values)) / (total - bases)


def bootstrap_sd(
    statistic: Callable[[Tensor], float],
    count: int,
    *,
    resamples: int,
    numbers: torch.Generator,
    groups: Tensor | None = None,
) -> float:
    """Bootstrap standard deviation (Efron 1979) of a statistic of `count` rows: its sampling variation within one seed.

    Args:
        statistic: gets indices of rows (count,) int64, drawn with replacement. Rows come repeatedly, which moves the
            values of statistics that compare rows with one another; only their spread is used here.
        count: number of rows.
        resamples: at least 2; the result's own relative error is about 1 / sqrt(2 resamples).
        numbers: draws the rows.
        groups: int64 (count,), on the generator's device, where each group has a fixed number of rows: as many are
            drawn of each, and the result is freed of the degrees of freedom that groups of few rows lose, which is
            exact where all groups vary alike. None: all rows come from one draw.

    Raises:
        ValueError: resamples or count is too small, or no group has two rows.
    """
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    device = numbers.device
    pools, share = [torch.arange(count, device=device)], 1.0
    if groups is not None:
        pools = [(groups == group).nonzero().flatten() for group in groups.unique()]
        share = 1 - len(pools) / count  # of the variation of new rows, what rows drawn again within groups show
    if not share:
        raise ValueError("groups must have two rows in one group or more, got one in each; leave groups out")

    def draw() -> Tensor:
        places = (torch.randint(len(rows), (len(rows),), generator=numbers, device=device) for rows in pools)
        return torch.cat([rows[place] for rows, place in zip(pools, places, strict=True)])

    return math.sqrt(_squares([statistic(draw()) for _ in range(resamples)]) / (resamples - 1) / share)


def pairs_needed(sd: float, effect: float, *, confidence: float = 0.95, power: float = 0.8) -> int | None:
    """The smallest number of pairs with which a two-sided paired t test sees a true mean difference with that power.

    Args:
        sd: standard deviation of one pair's difference. Estimated from few pairs it is itself uncertain (from 3 pairs,
            the upper 97.5 % bound is 6 times the estimate), and the number grows with its square.
        effect: the true mean difference in the units of `sd`, above 0.
        confidence: of the interval that has to leave out zero.
        power: the probability that it does.

    Returns:
        At least 2; None where more than MOST_PAIRS are needed.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0 < power < 1:
        raise ValueError(f"power must lie in (0, 1), got {power}")
    if paired_power(MOST_PAIRS, sd, effect, confidence=confidence) < power:
        return None
    low, high = 1, MOST_PAIRS  # power grows with the number of pairs
    while high - low > 1:
        middle = (low + high) // 2
        enough = paired_power(middle, sd, effect, confidence=confidence) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def paired_power(n: int, sd: float, effect: float, *, confidence: float = 0.95) -> float:
    """Probability that the t interval of n pairs leaves out zero when the true mean difference is `effect`.

    The test statistic has the noncentral t distribution, (z + effect sqrt(n) / sd) / s with z normal and s^2 a
    chi-squared variable over its degrees of freedom: given s, a normal probability, which is averaged over s.

    Raises:
        ValueError: an argument is outside its range.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if not 0 <= sd < math.inf:
        raise ValueError(f"sd must be at least 0 and finite, got {sd}")
    if not 0 < effect < math.inf:
        raise ValueError(f"effect must be greater than 0 and finite, got {effect}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    if sd == 0:
        return 1.0
    degrees = n - 1
    shift, critical = effect * math.sqrt(n) / sd, student_quantile((1 + confidence) / 2, degrees)
    # In v = log s the density exp(degrees (v - (e^2v - 1) / 2)) is analytic and falls below e^-40 at both ends, where
    # equal steps converge faster than any power of the step; divided by its sum it needs no constant.
    reach = 40 / degrees
    v = torch.linspace(-reach - math.sqrt(reach), math.sqrt(reach), 2001, dtype=torch.float64)
    density = (degrees * (v - torch.expm1(2 * v) / 2)).softmax(0)
    beyond = torch.special.ndtr(shift - critical * v.exp()) + torch.special.ndtr(-shift - critical * v.exp())
    return float(density @ beyond)


@lru_cache(maxsize=4096)
def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t with integer degrees of freedom, probability in [0.5, 1): bisection to the last bit."""
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < probability:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if student_cdf(middle, degrees) < probability else (low, middle)
    return middle


def student_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t, t >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for i in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    within = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return (1 + within) / 2


def _require_seeds(values: Sequence[Sequence[float]]) -> None:
    if not values:
        raise ValueError("values must be of 1 or more bases, got 0; add bases")
    for base, seeds in enumerate(values):
        if not seeds:
            raise ValueError(f"values must have seeds in every base, got none in base {base}; leave it out")


def _normal_quantile(probability: float) -> float:
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _squares(values: Sequence[float]) -> float:
    """Sum of squared deviations from the mean."""
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values)
