"""Two samples are told apart as by the slow obvious way, and samples of one kind are not told apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.skills.separation import (
    auroc,
    discriminant,
    draw_chance,
    separate,
    shrinkage,
    student_quantile,
    unit_rms,
)


def draw(seed: int, rows: int, features: int = 24, shift: float = 0.0) -> np.ndarray:
    numbers = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(features, features))
    return numbers.normal(size=(rows, features)) @ mixing + shift


@given(seed=st.integers(0, 1000), rows=st.integers(3, 40), others=st.integers(3, 40), features=st.integers(2, 60))
def test_the_discriminant_is_the_shrunk_inverse_covariance_times_the_difference(
    seed: int, rows: int, others: int, features: int
) -> None:
    one, other = draw(seed, rows, features), draw(seed + 1, others, features, shift=0.5)
    within = np.concatenate([one - one.mean(0), other - other.mean(0)])
    covariance = within.T @ within / (rows + others - 2)
    trace, squared = np.trace(covariance), np.trace(covariance @ covariance)
    share = shrinkage(trace, squared, rows + others - 2, features)
    shrunk = (1 - share) * covariance + share * trace / features * np.eye(features)
    expected = np.linalg.solve(shrunk, other.mean(0) - one.mean(0))
    both = np.concatenate([one, other])
    found = both.T @ discriminant(both @ both.T, np.arange(rows + others) >= rows, features)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_auroc_counts_pairs(negative: list[int], positive: list[int]) -> None:
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for n in negative for p in positive]
    found = auroc(np.array(negative, float), np.array(positive, float))
    assert found == pytest.approx(sum(pairs) / len(pairs))


@given(seed=st.integers(0, 1000), rows=st.integers(3, 200), features=st.integers(2, 50))
def test_shrinkage_is_a_share_that_falls_with_the_rows(seed: int, rows: int, features: int) -> None:
    values = np.random.default_rng(seed).uniform(0.1, 3, features)
    shares = [shrinkage(values.sum(), (values**2).sum(), count, features) for count in (rows, 10 * rows)]
    assert 0 <= shares[1] <= shares[0] <= 1


def test_a_known_covariance_is_shrunk_towards_the_truth() -> None:
    """Shrunk, the covariance of few rows is nearer to the true one than as it is, and than its mean variance."""
    truth = np.diag(np.linspace(0.2, 3, 40))
    rows = np.random.default_rng(0).normal(size=(30, 40)) * np.sqrt(np.diag(truth))
    sample = rows.T @ rows / 30
    share = shrinkage(np.trace(sample), np.trace(sample @ sample), 30, 40)
    target = np.trace(sample) / 40 * np.eye(40)
    errors = [np.linalg.norm((1 - s) * sample + s * target - truth) for s in (0.0, share, 1.0)]
    assert errors[1] < min(errors[0], errors[2])


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_samples_of_one_kind_look_like_chance_and_others_do_not(seed: int) -> None:
    one, same, far = draw(seed, 50), draw(seed + 20_000, 40), draw(seed + 40_000, 40, shift=3.0)
    chance = draw_chance(one, same, folds=5, draws=20, seed=seed)
    assert separate(one, same, folds=5, seed=seed) < chance.threshold(1e-5)
    chance = draw_chance(one, far, folds=5, draws=20, seed=seed)
    assert separate(one, far, folds=5, seed=seed) > max(0.95, chance.threshold(0.01))


def test_the_stated_rate_is_that_of_samples_of_one_kind() -> None:
    """Of 300 pairs of one kind, those above the threshold of 10 % are about that many (three deviations)."""
    above = 0
    for seed in range(300):
        one, other = draw(2 * seed, 24), draw(2 * seed + 1, 24)
        chance = draw_chance(one, other, folds=4, draws=20, seed=seed)
        above += separate(one, other, folds=4, seed=seed) > chance.threshold(0.1)
    assert 14 <= above <= 46


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    # Tables of the distribution: Abramowitz and Stegun, Handbook of Mathematical Functions, table 26.10.
    [(0.9, 10, 1.372), (0.95, 5, 2.015), (0.99, 5, 3.365), (0.99, 30, 2.457), (0.995, 60, 2.660), (0.999, 19, 3.579)],
)
def test_quantiles_are_those_of_tables(probability: float, freedom: int, expected: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=0.01)


def test_one_seed_gives_one_figure_and_length_does_not_count() -> None:
    one, other = draw(1, 20), draw(2, 20, shift=0.3)
    first = separate(one, other, folds=4, seed=3)
    assert first == separate(one, other, folds=4, seed=3)
    assert separate(one * np.linspace(1, 9, 20)[:, None], other, folds=4, seed=3) == pytest.approx(first)
    np.testing.assert_allclose((unit_rms(one) ** 2).mean(1), 1)


def test_rows_that_are_all_alike_can_be_compared() -> None:
    same = np.ones((10, 4))
    assert separate(same, same, folds=5, seed=0) == 0.5
    assert separate(same, same * [1, -1, 1, -1], folds=5, seed=0) == 1.0
