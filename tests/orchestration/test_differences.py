"""Differences of two arms by base and seed, and what belongs beside a metric."""

import numpy as np
import pytest
from scipy import stats

from mixflow_core.statistics import Interval
from orchestration.differences import (
    agreement,
    call,
    counted,
    difference,
    higher_is_better,
    recall_beside,
    recall_of,
    spread,
)


@pytest.mark.parametrize(
    ("metric", "recall"),
    [
        ("fd_digits", "recall_digits"),
        ("kid_digits", "recall_digits"),
        ("precision_digits", "recall_digits"),
        ("recall_digits", "recall_digits"),
        ("fd_dinov2", "recall_dinov2"),
        *((metric, "recall") for metric in ("fid", "sfid", "kid", "inception_score", "precision", "recall")),
    ],
)
def test_a_metrics_recall_is_that_of_its_features(metric, recall):
    assert recall_of(metric) == recall
    assert recall_beside(metric, {metric, "recall", "recall_digits", "recall_dinov2"}) == recall


@pytest.mark.parametrize("metric", ["fd_patches", "clip_score"])
def test_metrics_without_a_recall_take_any(metric):
    assert recall_beside(metric, [metric, "recall_digits"]) == "recall_digits"
    assert recall_beside(metric, [metric, "recall_digits", "recall"]) == "recall"
    assert recall_beside(metric, ["recall_dinov2", "recall_digits", metric]) == "recall_digits"  # whatever their order


def test_a_recall_of_other_features_is_no_substitute():
    assert recall_beside("fd_digits", ["fd_digits", "recall"]) == "recall"
    for recalls in ([], ["recall_digits"], ["recall", "recall_digits"]):
        with pytest.raises(ValueError, match=r"^evaluation.primary must be of a metric with recall_dinov2 beside it"):
            recall_beside("fd_dinov2", ["fd_dinov2", *recalls])
    with pytest.raises(ValueError, match=r"with recall beside it, got fd_patches beside \[\]; measure that too"):
        recall_beside("fd_patches", ["fd_patches"])


def test_what_was_not_measured_has_no_recall():
    with pytest.raises(ValueError, match=r"that was measured, \['fid', 'recall'\], got fd_digits$"):
        recall_beside("fd_digits", ["recall", "fid"])


def test_the_better_direction_goes_by_the_name():
    up = {"precision", "recall", "precision_digits", "recall_dinov2", "inception_score", "clip_score"}
    down = {"fid", "sfid", "kid", "fd_digits", "kid_digits", "fd_patches", "fd_clip"}
    assert {metric for metric in up | down if higher_is_better(metric)} == up


@pytest.mark.parametrize(
    ("low", "high", "fid", "recall"),
    [
        (-2.0, -1.0, "better", "worse"),
        (1.0, 2.0, "worse", "better"),
        (-1.0, 2.0, "inconclusive", "inconclusive"),
        (0.0, 1.0, "inconclusive", "inconclusive"),
        (0.0, 0.0, "inconclusive", "inconclusive"),
    ],
)
def test_an_interval_that_covers_zero_is_inconclusive(low, high, fid, recall):
    interval = Interval((low + high) / 2, low, high, 1.0, 3)
    assert (call("fid", interval), call("recall", interval)) == (fid, recall)


ARM = [[3.1, 2.9, 3.3], [5.2, 5.6, 5.0], [4.1, 4.4, 3.9]]
CONTROL = [[3.5, 3.6, 3.4], [5.9, 6.1, 5.5], [4.4, 4.6, 4.8]]


def test_one_base_is_compared_over_its_seeds():
    expected = stats.ttest_rel(ARM[0], CONTROL[0]).confidence_interval(0.95)
    found = difference("fid", ARM[:1], CONTROL[:1])
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert (found["n"], found["call"], found["pairs_needed"]) == (3, "inconclusive", None)


def test_several_bases_are_compared_over_their_means():
    expected = stats.ttest_rel(np.mean(ARM, 1), np.mean(CONTROL, 1)).confidence_interval(0.95)
    found = difference("fid", ARM, CONTROL)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert (found["n"], found["call"]) == (3, "better")
    assert difference("inception_score", ARM, CONTROL)["call"] == "worse"


@pytest.mark.parametrize(("bases", "effect"), [(1, 0.1), (3, 0.01)])
def test_pairs_needed_count_what_the_interval_counts(bases, effect):
    """A share of the mean of the control's bases, against the sd over seeds (one base) or bases, by simulation."""
    found = difference("fid", ARM[:bases], CONTROL[:bases], effect=effect)
    size, n = effect * np.mean(CONTROL[:bases]), found["pairs_needed"]
    numbers = np.random.default_rng(0)
    seen = [
        (stats.ttest_1samp(numbers.normal(size, found["sd"], (20_000, count)), 0, axis=1).pvalue < 0.05).mean()
        for count in (n, n - 1)
    ]
    assert seen[1] < 0.8 <= seen[0]


def test_an_effect_that_cannot_be_seen_has_no_number():
    assert difference("kid", [[-1.0, 1.0, 0.5]], [[-1.0, 1.0, 0.0]], effect=0.05)["pairs_needed"] is None  # mean 0
    assert difference("kid", ARM, CONTROL, effect=1e-5)["pairs_needed"] is None  # takes more than 1,000
    # A kernel distance may be negative: the effect is a share of its size.
    negative = difference("kid", [[-3.0, -4.0, -3.2]], [[-3.5, -3.6, -3.4]], effect=0.1)["pairs_needed"]
    assert negative == difference("kid", [[3.0, 4.0, 3.2]], [[3.5, 3.6, 3.4]], effect=0.1)["pairs_needed"]


def test_shares_of_images_that_are_equal_by_chance_are_no_certainty():
    """Three pairs that all differ by one image of 100: t(0.975, 2) = 4.303 times a step over the root of 3."""
    arm, control = [[0.51, 0.61, 0.41]], [[0.5, 0.6, 0.4]]
    found = difference("recall", arm, control, step=0.01)
    assert found["call"] == "inconclusive"
    assert (found["low"], found["high"]) == pytest.approx((0.01 - 0.02484, 0.01 + 0.02484), abs=1e-5)
    assert difference("recall", arm, control)["call"] == "better"
    varied = [[0.51, 0.66, 0.31]]
    assert difference("recall", varied, control, step=0.01) == difference("recall", varied, control)


def test_how_small_a_difference_is():
    found = difference("fid", [[10.1, 9.9, 10.0]], [[10.0, 10.0, 10.0]], effect=0.05)
    assert (found["call"], found["less_than"]) == ("inconclusive", 0.05)
    assert difference("fid", [[10.1, 9.9, 10.0]], [[10.0, 10.0, 10.0]], effect=0.02)["less_than"] is None
    assert difference("fid", [[10.1, 9.9, 10.0]], [[10.0, 10.0, 10.0]])["less_than"] is None


def test_pairs_must_be_whole():
    with pytest.raises(ValueError, match="zip"):
        difference("fid", ARM, CONTROL[:2])
    with pytest.raises(ValueError, match="zip"):
        difference("fid", [ARM[0][:2]], CONTROL[:1])


@pytest.mark.parametrize(
    ("expected", "low", "high", "found"),
    [
        ("better", -2.0, -1.0, "agrees"),
        ("better", 1.0, 2.0, "disagrees"),
        ("better", -1.0, 2.0, "inconclusive"),
        ("worse", 1.0, 2.0, "agrees"),
        ("worse", -2.0, -1.0, "disagrees"),
        ("equal", -0.4, 0.3, "agrees"),
        ("equal", 0.6, 0.8, "disagrees"),
        ("equal", -0.8, -0.6, "disagrees"),
        ("equal", -0.6, 0.3, "inconclusive"),
        ("equal", 0.1, 0.4, "agrees"),  # surely not zero, and surely small
    ],
)
def test_a_claim_agrees_where_the_interval_says_so(expected, low, high, found):
    """Of a metric whose lower values are better, with a bound of 0.5 for equality."""
    word = "better" if high < 0 else "worse" if low > 0 else "inconclusive"
    assert agreement(expected, {"low": low, "high": high, "call": word}, 0.5) == found


def test_a_single_pair_has_a_value_and_no_interval():
    found = difference("fd_digits", [[3.0]], [[5.0]], effect=0.1)
    assert (found["mean"], found["low"], found["high"], found["n"]) == (-2.0, None, None, 1)
    assert (found["call"], found["pairs_needed"]) == ("inconclusive", None)
    assert agreement("better", found, 0.5) == "inconclusive"
    assert spread([[3.0]]) == {"mean": 3.0, "low": None, "high": None, "sd": None, "n": 1, "bases": 1}


@pytest.mark.parametrize(
    ("values", "bases", "text"),
    [
        ([[1.0, 2.0, 4.0]], 1, "3 seeds"),
        ([[1.0, 2.0], [3.0, 4.0]], 2, "2 bases"),
        ([[1.0, 2.0, 4.0]], 2, "base 0 alone, 3 seeds"),
        ([[1.0]], 2, "base 0 alone, 1 seed"),
    ],
)
def test_an_interval_says_what_it_is_over(values, bases, text):
    assert counted(spread(values), bases) == text
