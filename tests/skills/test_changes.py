"""Changes of skill are found where they are, and none in a stream of one skill."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.errors import ConfigError, DataError
from dylora_moe.skills.changes import find_changes

FEATURES = 12
Segment = tuple[int, int]
"""Skill, rows."""


def draw(segments: list[Segment], seed: int, distance: float = 3.0) -> np.ndarray:
    """Rows of skills that differ in their means by so many deviations, under one covariance that is not round."""
    numbers, skills = np.random.default_rng(seed), np.random.default_rng(99)
    mixing = skills.normal(size=(FEATURES, FEATURES))
    means = np.linalg.qr(skills.normal(size=(FEATURES, FEATURES)))[0] * distance / np.sqrt(2)
    parts = [(numbers.normal(size=(rows, FEATURES)) + means[skill]) @ mixing for skill, rows in segments]
    return np.concatenate(parts).astype(np.float32)


def borders(segments: list[Segment]) -> np.ndarray:
    return np.cumsum([rows for _, rows in segments])[:-1]


@st.composite
def streams(draw: st.DrawFn) -> list[Segment]:
    """Two to four segments, the same skill never twice running but perhaps again."""
    steps = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    skills = np.cumsum(steps) % 5
    return [(int(skill), draw(st.integers(40, 70))) for skill in skills]


@settings(deadline=None, max_examples=4)
@given(segments=streams(), seed=st.integers(0, 1000))
def test_all_changes_are_found_within_a_few_rows_and_no_others(segments: list[Segment], seed: int) -> None:
    found = find_changes(draw(segments, seed, distance=6.0), window=40)
    assert len(found) == len(segments) - 1
    assert np.abs(np.array(found) - borders(segments)).max() <= 3


def test_the_place_is_finer_than_the_places_looked_at() -> None:
    """They are four rows apart here."""
    sizes = (41, 42, 43)
    found = [find_changes(draw([(0, size), (1, 45)], size, distance=6.0), window=40) for size in sizes]
    assert sum(places == (size,) for places, size in zip(found, sizes, strict=True)) >= 2


def test_streams_of_one_skill_change_in_no_larger_share_than_stated() -> None:
    """Of 16 streams, those with a change at a stated rate of 10 % are no more than that (three deviations)."""
    changed = sum(bool(find_changes(draw([(0, 80)], seed), window=20, rate=0.1, seed=seed)) for seed in range(16))
    assert changed <= 5


def test_a_small_difference_is_found_at_a_large_rate_only() -> None:
    features = draw([(0, 50), (1, 50)], 3, distance=2.0)
    assert find_changes(features, window=50, rate=0.9)
    assert not find_changes(features, window=50, rate=1e-9)


@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 1000))
def test_the_order_of_rows_within_a_skill_does_not_matter_much(seed: int) -> None:
    segments = [(0, 40), (1, 50), (0, 40)]
    features, order = draw(segments, seed, distance=6.0), np.random.default_rng(seed)
    first = find_changes(features, window=40)
    parts = [order.permutation(part) for part in np.split(features, borders(segments))]
    assert np.abs(np.array(first) - np.array(find_changes(np.concatenate(parts), window=40))).max() <= 3


def test_one_seed_gives_one_answer_and_the_stream_is_left_as_it_was() -> None:
    features = draw([(0, 30), (1, 30)], 5, distance=4.0)
    before = features.copy()
    assert find_changes(features, window=30, seed=4) == find_changes(features, window=30, seed=4)
    np.testing.assert_array_equal(features, before)


@pytest.mark.parametrize("rows", [0, 1, 39])
def test_a_stream_too_short_for_two_skills_has_no_change(rows: int) -> None:
    features = draw([(0, rows // 2), (1, rows - rows // 2)], 0, distance=9.0)
    assert find_changes(features) == ()


def test_the_shortest_two_skills_are_told_apart() -> None:
    assert find_changes(draw([(0, 20), (1, 20)], 0, distance=9.0)) == (20,)


@pytest.mark.parametrize("rows", [24, 28])
def test_no_segment_is_shorter_than_asked(rows: int) -> None:
    """Shorter ones at the ends take what they lack from their neighbour."""
    features = draw([(0, rows), (1, 60), (2, rows)], rows, distance=9.0)
    assert find_changes(features, window=40, least=30, rate=0.5) == (30, len(features) - 30)


@pytest.mark.parametrize("seed", [3, 4])
def test_a_window_that_reaches_over_a_change_makes_no_second_one(seed: int) -> None:
    """Beside a change the score has more than one top: here two to four places pass at first, as they should not."""
    segments = [(0, 90), (1, 100), (0, 90)]
    found = find_changes(draw(segments, seed, distance=4.0), window=60, least=10, rate=0.3)
    assert len(found) == 2
    assert np.abs(np.array(found) - borders(segments)).max() <= 3


def test_rows_that_are_all_alike_do_not_change() -> None:
    assert find_changes(np.ones((80, 4), np.float32), window=30) == ()


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"least": 9}, "least"), ({"window": 15}, "window"), ({"rate": 0.0}, "rate"), ({"rate": 1.0}, "rate")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        find_changes(np.ones((50, 4), np.float32), **settings)


@pytest.mark.parametrize("features", [np.ones(50, np.float32), np.full((50, 4), np.nan, np.float32)])
def test_what_is_no_table_of_numbers_is_refused(features: np.ndarray) -> None:
    with pytest.raises(DataError, match="finite"):
        find_changes(features)
