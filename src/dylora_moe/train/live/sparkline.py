"""A curve in a line of text: numbers -> block characters. Pure."""

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
# For values that are all the same, which are neither high nor low.
_LEVEL = BLOCKS[3]


def sparkline(values: Sequence[float], width: int) -> str:
    """One block a value, the lowest value the lowest block; means of neighbours where there are more than `width`.

    Args:
        values: In order of time. What is not finite is a blank.
        width: Characters at most.
    """
    shown = resampled(values, width)
    finite = [value for value in shown if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_block(value, low, high) if math.isfinite(value) else " " for value in shown)


def resampled(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbours, each of the finite ones among them; nan where none is."""
    width = max(width, 0)
    if len(values) <= width:
        return list(values)
    bounds = [place * len(values) // width for place in range(width + 1)] if width else []
    return [_mean(values[start:end]) for start, end in pairwise(bounds)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    # Divided first, so that no sum is beyond the largest number.
    return sum(value / len(finite) for value in finite) if finite else math.nan


def _block(value: float, low: float, high: float) -> str:
    span = high / 2 - low / 2  # halves, for the same reason
    if span == 0:
        return _LEVEL
    part = (value / 2 - low / 2) / span
    return BLOCKS[min(int(part * len(BLOCKS)), len(BLOCKS) - 1)]
