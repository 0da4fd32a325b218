"""Intervals cover the truth as often as they say, and a test by permutation is the exact one."""

import itertools
import math

import numpy as np
import pytest

from dylora_moe.errors import DataError
from dylora_moe.evaluate.intervals import holm, mean_interval, paired_difference, ratio_interval, share_interval


def test_an_interval_covers_the_truth_in_nineteen_of_twenty_draws() -> None:
    random, covered = np.random.default_rng(1), 0
    for _ in range(300):
        sizes = random.integers(5, 50, size=60)
        losses = sizes * random.normal(2.0, 0.5, size=60)
        low, high = ratio_interval(losses, sizes) or (0.0, 0.0)
        covered += low <= 2.0 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_an_interval_is_that_of_the_ratio_of_sums_and_not_of_the_mean_ratio() -> None:
    sizes = np.array([1.0] * 50 + [99.0] * 50)
    losses = np.where(sizes == 1, 10.0, 99.0)  # 10 a token in short rows, 1 in long ones
    low, high = ratio_interval(losses, sizes) or (0.0, 0.0)
    assert low < (50 * 10 + 50 * 99) / (50 * 100) < high < 2


def test_intervals_are_the_same_every_time_and_none_of_one_row() -> None:
    values = list(np.random.default_rng(0).normal(size=30))
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval([1.0]) is None and mean_interval([2.0, 2.0]) is None


def test_a_share_is_not_sure_because_all_rows_are_alike() -> None:
    low, high = share_interval(0, 20)
    assert low == pytest.approx(0.0, abs=1e-12) and high == pytest.approx(0.161, abs=0.002)  # Wilson's, by hand
    low, high = share_interval(20, 20)
    assert high == pytest.approx(1.0) and low == pytest.approx(0.839, abs=0.002)
    assert share_interval(10, 100) == pytest.approx((0.0552, 0.1744), abs=0.001)
    random, covered = np.random.default_rng(3), 0
    for right in random.binomial(30, 0.1, size=400):
        low, high = share_interval(int(right), 30)
        covered += low <= 0.1 <= high
    assert covered / 400 > 0.9
    for right, of in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(DataError, match="a share needs"):
            share_interval(right, of)


def test_many_rows_take_little_memory() -> None:
    low, high = mean_interval(np.random.default_rng(0).normal(size=200_000).tolist()) or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(200_000), rel=0.15)


def test_p_is_the_share_of_tossed_signs_that_differ_as_much() -> None:
    first, second = [1.0, 2.5, 3.0, 1.2, 4.0, 2.2, 0.5, 3.3], [1.1, 2.0, 2.1, 1.0, 3.9, 1.5, 0.9, 2.5]
    change = np.array(first) - np.array(second)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = float((np.abs(signs @ change) >= abs(change.sum()) - 1e-12).mean())
    found = paired_difference(first, second, [2.0] * 8)
    assert found.p == pytest.approx(exact, abs=0.012)
    assert found.difference == pytest.approx(change.sum() / 16) and found.rows == 8
    assert found.interval is not None and found.interval[0] < found.difference < found.interval[1]


def test_p_values_of_no_difference_are_even() -> None:
    random = np.random.default_rng(2)
    found = [paired_difference(random.normal(size=40), random.normal(size=40), np.ones(40)).p for _ in range(200)]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.10
    assert 0.4 <= np.mean(found) <= 0.6


def test_the_same_twice_is_no_difference() -> None:
    found = paired_difference([1.0, 2.0], [1.0, 2.0], [1.0, 1.0])
    assert (found.difference, found.p, found.interval) == (0.0, 1.0, (0.0, 0.0))


def test_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match="at least one, got 0 and 0 of 0"):
        paired_difference([], [], [])
    with pytest.raises(DataError, match="got 2 and 1 of 2"):
        paired_difference([1.0, 2.0], [1.0], [1.0, 1.0])


def test_holms_correction() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
