"""Curves in a line of text, whatever the values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dylora_moe.train.live.sparkline import BLOCKS, resampled, sparkline

anything = st.lists(st.floats(), max_size=60)
numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=60)


@given(anything, st.integers(-2, 70))
def test_never_wider_and_never_anything_but_blocks_and_blanks(values: list[float], width: int) -> None:
    text = sparkline(values, width)
    assert len(text) == min(len(values), max(width, 0))
    assert set(text) <= {*BLOCKS, " "}


@given(anything)
def test_what_is_not_finite_is_a_blank(values: list[float]) -> None:
    assert [character == " " for character in sparkline(values, 60)] == [not math.isfinite(value) for value in values]


@given(numbers)
def test_higher_values_are_never_lower_blocks(values: list[float]) -> None:
    text = sparkline(values, len(values))
    heights = [BLOCKS.index(character) for _, character in sorted(zip(values, text, strict=True))]
    assert heights == sorted(heights)
    if max(values) / 2 - min(values) / 2 > 0:
        assert (heights[0], heights[-1]) == (0, len(BLOCKS) - 1)


@given(numbers, st.integers(1, 60))
def test_means_stay_between_the_values(values: list[float], width: int) -> None:
    slack = max(map(abs, values)) * 1e-9
    assert all(min(values) - slack <= value <= max(values) + slack for value in resampled(values, width))


def test_a_staircase() -> None:
    assert sparkline(range(8), 8) == BLOCKS and sparkline(range(16), 8) == BLOCKS
    assert sparkline(range(8, 0, -1), 8) == BLOCKS[::-1]


@pytest.mark.parametrize("values", [[0.0], [3.5], [-1.0, -1.0, -1.0]])
def test_one_value_and_values_that_are_all_the_same_lie_in_the_middle(values: list[float]) -> None:
    assert sparkline(values, 10) == BLOCKS[3] * len(values)


def test_a_mean_leaves_out_what_is_not_finite() -> None:
    assert resampled([1.0, math.nan, 3.0, math.inf], 2) == [1.0, 3.0]
    assert math.isnan(resampled([math.nan, math.inf, 1.0, 1.0], 2)[0])
    assert sparkline([], 5) == ""


def test_infinity_does_not_flatten_the_rest() -> None:
    assert sparkline([*range(8), math.inf], 9) == BLOCKS + " "
