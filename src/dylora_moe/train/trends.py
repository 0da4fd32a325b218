"""Trends in noisy series of numbers, robustly: pure statistics."""

import math
from collections.abc import Sequence
from statistics import fmean, median

# Values that a long history is averaged down to, so that a check costs the same in every run.
MAX_VALUES = 60
# Standard errors of a fall above which it is believed. Low, since a wrong alarm costs more than a late one.
BELIEF = 1.0


def stands_still(values: Sequence[float], *, fall: float) -> bool:
    """True when nothing says that values fell: neither their trend, nor their start against their end.

    Args:
        values: At least 6, in order of time.
        fall: Part of the start by which the last third lies lower if there is a fall.
    """
    third = len(values) // 3
    first, last = values[:third], values[-third:]
    # The mean as well, since a median jumps where the losses of two domains lie far apart.
    fell = any(of(last) < of(first) * (1 - fall) for of in (median, fmean))
    return not fell and trend(binned(values)) > -BELIEF and not fell_early(values)


def spread(values: Sequence[float]) -> float:
    """Robust standard deviation: 1.4826 times the median distance from the median, that of a normal distribution."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def binned(values: Sequence[float]) -> list[float]:
    """At most `MAX_VALUES` means of neighbours."""
    size = -(-len(values) // MAX_VALUES)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [fmean(part) for part in parts]


def trend(values: Sequence[float]) -> float:
    """Mann-Kendall statistic in standard deviations: negative where values tend to fall, near 0 for noise.

    Source: H. B. Mann, Nonparametric tests against trend, Econometrica 13 (1945).
    """
    n = len(values)
    total = sum((late > early) - (late < early) for i, early in enumerate(values) for late in values[i + 1 :])
    return total / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def fell_early(values: Sequence[float]) -> bool:
    """The first tenth lies above the last third by more than the error of that difference of medians.

    A median's standard error is 1.25 sigma / sqrt(n).
    """
    early, late = values[: max(5, len(values) // 10)], values[-(len(values) // 3) :]
    error = 1.25 * spread(late) * math.sqrt(1 / len(early) + 1 / len(late))
    return median(early) - median(late) > BELIEF * error
