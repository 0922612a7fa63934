"""Intervals, variance parts, bootstrap and power against scipy, hand-computed figures and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from toys import normals, uniforms

from mixflow_core.statistics import (
    bootstrap_sd,
    nested_interval,
    paired_power,
    pairs_needed,
    quantile_ranks,
    ratio_interval,
    seed_variance,
    share_interval,
    student_cdf,
    student_interval,
    student_quantile,
)

# Student's t


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30, 101])
def test_student_distribution_is_scipys(degrees):
    for t in (0.0, 0.3, 1.0, 2.5, 12.0):
        assert student_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)
    for p in (0.5, 0.6, 0.9, 0.975, 0.995):
        assert student_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9, abs=1e-9)


def test_student_interval_is_scipys():
    values = [0.3, -0.1, 0.25, 0.4, 0.05]
    for confidence in (0.8, 0.95):
        interval = student_interval(values, confidence=confidence)
        expected = stats.t.interval(confidence, 4, loc=np.mean(values), scale=stats.sem(values))
        assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-9)
    assert (interval.mean, interval.sd, interval.n) == pytest.approx((np.mean(values), np.std(values, ddof=1), 5))


def coverage(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_covers_the_truth_as_often_as_it_says(n):
    draws = np.random.default_rng(n).normal(0.7, 2.0, (20_000, n))  # Monte-Carlo error 0.15 %
    intervals = [student_interval(row) for row in draws.tolist()]
    assert 0.945 < coverage(intervals, 0.7) < 0.955
    # With the normal quantile instead it would be off by more than that.
    half = 1.96 * draws.std(1, ddof=1) / math.sqrt(n)
    assert np.mean(abs(draws.mean(1) - 0.7) <= half) < 0.925


def test_pairing_takes_out_the_noise_that_both_share():
    """Shared sd 1, own sd 0.1: both intervals cover the truth, the unpaired one is about ten times wider."""
    numbers = np.random.default_rng(0)
    shared = numbers.normal(0, 1, (2000, 5))
    a, b = (mean + shared + numbers.normal(0, 0.1, shared.shape) for mean in (0.3, 0.5))
    paired = [student_interval(row) for row in (a - b).tolist()]
    unpaired = stats.ttest_ind(a, b, axis=1, equal_var=False).confidence_interval(0.95)
    widths, others = np.array([i.high - i.low for i in paired]), unpaired.high - unpaired.low
    assert (widths < others).mean() > 0.99
    assert 6 < np.median(others / widths) < 12
    assert 0.94 < coverage(paired, -0.2) < 0.96
    assert np.mean([i.high < 0 for i in paired]) > 0.6  # sees the difference,
    assert np.mean(unpaired.high < 0) < 0.05  # which is lost without pairing


def test_one_value_has_no_interval():
    with pytest.raises(
        ValueError, match=r"^values must number at least 2 for an interval, got 1; run more replicates$"
    ):
        student_interval([1.0])


# Several bases


def test_with_several_bases_the_interval_is_over_their_means():
    values = [[1.0, 2.0, 6.0], [0.0, 1.0], [5.0]]  # means 3, 0.5, 5
    expected = stats.ttest_1samp([3.0, 0.5, 5.0], 0).confidence_interval(0.9)
    interval = nested_interval(values, confidence=0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (interval.mean, interval.n) == (pytest.approx(8.5 / 3), 3)
    assert interval.sd == pytest.approx(np.std([3, 0.5, 5], ddof=1))


def test_with_one_base_the_interval_is_over_its_seeds():
    a, b = uniforms(1, 6).tolist(), uniforms(2, 6).tolist()
    test = stats.ttest_rel(a, b).confidence_interval(0.95)
    interval = nested_interval([[x - y for x, y in zip(a, b, strict=True)]])
    assert (interval.low, interval.high) == pytest.approx((test.low, test.high), rel=1e-9)


def test_seeds_of_one_base_are_no_independent_witnesses():
    """Base sd 1, seed sd 0.3, 4 bases of 5 seeds: over the bases the truth is covered, over all pairs it is not."""
    numbers = np.random.default_rng(7)
    draws = 0.2 + numbers.normal(0, 1, (10_000, 4, 1)) + numbers.normal(0, 0.3, (10_000, 4, 5))
    nested = [nested_interval(rows) for rows in draws.tolist()]
    assert 0.943 < coverage(nested, 0.2) < 0.957
    pooled = [student_interval(rows) for rows in draws.reshape(10_000, 20).tolist()]
    assert coverage(pooled, 0.2) < 0.75


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"^values must be of 1 or more bases, got 0; add bases$"),
        ([[1.0, 2.0], []], r"^values must have seeds in every base, got none in base 1; leave it out$"),
        ([[1.0]], r"^values must number at least 2 for an interval, got 1; run more replicates$"),
    ],
)
def test_no_interval_without_seeds(values, message):
    with pytest.raises(ValueError, match=message):
        nested_interval(values)


def test_seed_variance_is_that_computed_by_hand():
    # Squares within 2 + 2 + 2 over 3 degrees of freedom.
    assert seed_variance([[1.0, 3.0], [5.0, 7.0], [6.0, 8.0]]) == pytest.approx(2)
    # Of 3 and 1 seeds: 8 over 2 degrees.
    assert seed_variance([[0.0, 2.0, 4.0], [6.0]]) == pytest.approx(4)


@pytest.mark.parametrize("seeds", [(3, 3, 3, 3), (1, 2, 5, 4)])
def test_seed_variance_is_unbiased(seeds):
    numbers = np.random.default_rng(3)
    bases = numbers.normal(5, 0.5, (4000, len(seeds)))
    found = np.array(
        [
            seed_variance([numbers.normal(base, 1.0, k).tolist() for base, k in zip(of, seeds, strict=True)])
            for of in bases
        ]
    )
    assert abs(found.mean() - 1.0) < 3.5 * found.std() / math.sqrt(len(found))


def test_seed_variance_asks_for_two_seeds():
    message = r"^values must have two seeds in one base or more, got one in each; run more replicates$"
    with pytest.raises(ValueError, match=message):
        seed_variance([[1.0], [2.0]])


# Bootstrap


def bootstrap(statistic, count, resamples=4000, seed=0):
    return bootstrap_sd(statistic, count, resamples=resamples, numbers=torch.Generator().manual_seed(seed))


def test_the_bootstrap_sd_of_a_mean_is_its_closed_form():
    x = normals(1, 50) * 3 + 100
    expected = x.std(correction=0).item() / math.sqrt(50)
    assert bootstrap(lambda rows: float(x[rows].mean()), 50) == pytest.approx(expected, rel=0.05)


def test_the_bootstrap_sd_of_a_median_is_scipys():
    x = normals(2, 41)
    scipys = stats.bootstrap(
        (x.numpy(),), np.median, n_resamples=4000, method="basic", rng=np.random.default_rng(0)
    ).standard_error
    assert bootstrap(lambda rows: float(x[rows].median()), 41) == pytest.approx(scipys, rel=0.06)


def test_the_bootstrap_draws_rows_with_replacement_from_the_generator_it_is_given():
    drawn = []

    def statistic(rows):
        drawn.append(rows)
        return float(len(rows))

    assert bootstrap(statistic, 20, resamples=500) == 0.0
    assert {(rows.dtype, tuple(rows.shape)) for rows in drawn} == {(torch.int64, (20,))}
    counts = torch.cat(drawn).bincount(minlength=20)
    assert len(counts) == 20
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # Of 20 draws from 20 rows 20 (1 - (19/20)^20) = 12.83 are expected to differ.
    assert np.mean([len(rows.unique()) for rows in drawn]) == pytest.approx(12.83, abs=0.3)
    x = normals(3, 20)
    same, again, other = (bootstrap(lambda rows: float(x[rows].mean()), 20, 50, seed) for seed in (1, 1, 2))
    assert same == again != other


@pytest.mark.parametrize("rows_each", [2, 3, 30])
def test_the_bootstrap_within_groups_is_the_closed_form_of_a_stratified_mean(rows_each):
    """The mean of strata of n rows each varies by the mean of their variances over the number of rows, however few."""
    groups = torch.arange(24 * rows_each) % 24
    x = normals(4, len(groups)) + 10 * groups
    variances = [x[groups == group].var().item() for group in range(24)]
    expected = math.sqrt(np.mean(variances) / len(x))
    numbers = torch.Generator().manual_seed(0)

    def mean_of(rows):
        assert groups[rows].bincount().tolist() == [rows_each] * 24
        return float(x[rows].mean())

    assert bootstrap_sd(mean_of, len(x), resamples=2000, numbers=numbers, groups=groups) == pytest.approx(
        expected, rel=0.06
    )


def test_a_bootstrap_within_groups_of_one_row_is_refused():
    numbers = torch.Generator()
    with pytest.raises(
        ValueError, match=r"^groups must have two rows in one group or more, got one in each; leave groups out$"
    ):
        bootstrap_sd(lambda rows: 0.0, 5, resamples=2, numbers=numbers, groups=torch.arange(5))


def test_a_bootstrap_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^resamples must be at least 2, got 1$"):
        bootstrap(float, 5, resamples=1)
    with pytest.raises(ValueError, match=r"^count must be at least 1, got 0$"):
        bootstrap(float, 0)


# Power


def scipys_power(n, sd, effect, confidence=0.95):
    law = stats.nct(n - 1, effect * math.sqrt(n) / sd)
    critical = stats.t.ppf((1 + confidence) / 2, n - 1)
    # scipy answers nan where the wrong tail is below its precision.
    return law.sf(critical) + np.nan_to_num(law.cdf(-critical))


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("n", [2, 3, 4, 7, 30, 200, 1000])
def test_power_is_that_of_scipys_noncentral_t(n, confidence):
    for noncentrality in (0.01, 0.5, 2.0, 4.0, 9.0):
        effect = noncentrality * 3 / math.sqrt(n)
        expected = scipys_power(n, 3, effect, confidence)
        assert paired_power(n, 3, effect, confidence=confidence) == pytest.approx(expected, abs=1e-9)


def test_power_is_how_often_the_interval_leaves_out_zero():
    draws = np.random.default_rng(5).normal(0.8, 1.0, (20_000, 6))
    seen = np.mean([not i.low <= 0 <= i.high for i in map(student_interval, draws.tolist())])
    assert paired_power(6, 1.0, 0.8) == pytest.approx(seen, abs=0.012)


def test_pairs_needed_are_the_tabulated_ones():
    # Standardised effects 0.2, 0.5 and 0.8 at 5 % and power 0.8, as power tables for paired t tests have them.
    assert [pairs_needed(1.0, effect) for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]


@pytest.mark.parametrize(("confidence", "power"), [(0.95, 0.8), (0.95, 0.5), (0.99, 0.95), (0.8, 0.9)])
def test_pairs_needed_are_the_fewest_by_scipy(confidence, power):
    for ratio in (0.15, 0.4, 1.0, 1.7, 3.0, 8.0, 40.0):
        enough = (n for n in range(2, 1001) if scipys_power(n, 2.0, ratio * 2.0, confidence) >= power)
        assert pairs_needed(2.0, ratio * 2.0, confidence=confidence, power=power) == next(enough, None)


def test_the_ends_of_the_number_of_pairs():
    assert pairs_needed(0.0, 1e-6) == 2
    assert pairs_needed(1.0, 1e9) == 2
    at_most = next(r for r in np.linspace(0.08, 0.1, 400) if scipys_power(1000, 1, r) >= 0.8)
    assert pairs_needed(1.0, at_most) == 1000
    assert pairs_needed(1.0, at_most - 1e-4) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sd": -1.0}, "sd must be at least 0 and finite, got -1.0"),
        ({"sd": math.nan}, "sd must be at least 0 and finite, got nan"),
        ({"effect": 0.0}, "effect must be greater than 0 and finite, got 0.0"),
        ({"effect": -0.1}, "effect must be greater than 0 and finite, got -0.1"),
        ({"confidence": 1.0}, r"confidence must lie in \(0, 1\), got 1.0"),
        ({"power": 1.0}, r"power must lie in \(0, 1\), got 1.0"),
    ],
)
def test_impossible_questions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        pairs_needed(**{"sd": 1.0, "effect": 0.5, **arguments})


def test_one_pair_has_no_power():
    with pytest.raises(ValueError, match=r"^n must be at least 2, got 1$"):
        paired_power(1, 1.0, 1.0)


# ------------------------------------------------------------------------------- quantiles, shares, ratios of means


@pytest.mark.parametrize("level", [0.05, 0.25, 0.5, 0.95])
@pytest.mark.parametrize("n", [1, 10, 71, 72, 73, 500, 20_000])
def test_the_ranks_of_a_quantile_are_the_binomials(n, level):
    """low is the last place whose order statistic lies above the quantile with probability <= .025; high alike."""
    low, high = quantile_ranks(n, level)
    law = stats.binom(n, level)
    lows = [i for i in range(n) if law.cdf(i) <= 0.025] if n < 1000 else [int(law.ppf(0.025)) - 1]
    highs = [j for j in range(n) if law.sf(j) <= 0.025] if n < 1000 else [int(law.ppf(0.975))]
    assert low == (max(lows) if lows else None)
    assert high == (min(highs) if highs else None)


def test_the_quantiles_interval_covers_in_every_law():
    """Nominally 95 %, discreteness makes it more; 4,000 repetitions have a standard error of 0.35 %."""
    numbers = np.random.default_rng(0)
    for law, quantile in ((numbers.standard_normal, stats.norm.ppf), (numbers.standard_cauchy, stats.cauchy.ppf)):
        rows = np.sort(law((4000, 150)), axis=1)
        for level in (0.05, 0.5, 0.75):
            low, high = quantile_ranks(150, level)
            covered = np.mean((rows[:, low] <= quantile(level)) & (quantile(level) <= rows[:, high]))
            assert 0.94 < covered < 0.98


@pytest.mark.parametrize(("count", "n"), [(0, 20), (20, 20), (3, 20), (250, 1000)])
def test_a_shares_interval_is_scipys(count, n):
    expected = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert share_interval(count, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"count must lie in \[0, n\] with n above 0, got 0 of 0"):
        share_interval(0, 0)


def test_the_interval_of_a_ratio_of_means_covers_it():
    """a = 2 b + noise with skewed b: 3,000 repetitions of 200 pairs."""
    numbers = np.random.default_rng(1)
    b = numbers.exponential(1.0, (3000, 200))
    a = 2 * b + numbers.normal(0.5, 1.0, b.shape)
    found = [ratio_interval(torch.tensor(x), torch.tensor(y)) for x, y in zip(a, b, strict=True)]
    covered = np.mean([i.low <= 2.5 <= i.high for i in found])
    assert 0.935 < covered < 0.965
    width = np.mean([i.high - i.low for i in found])
    assert width == pytest.approx(2 * 1.97 * np.sqrt((1 + 0.5**2) / 200), rel=0.05)


def test_a_ratio_without_variation_is_a_point():
    b = torch.tensor([1.0, 2.0, 5.0])
    found = ratio_interval(3 * b, b)
    assert (found.mean, found.low, found.high, found.n) == (3, 3, 3, 3)
