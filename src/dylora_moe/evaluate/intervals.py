"""Figures of rows -> intervals, and whether two models differ on the same rows. Pure numbers, by seeded draws."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dylora_moe.errors import DataError

# Draws of a bootstrap and of a test by permutation: enough for two digits of a 95 % interval and for p to 0.0005.
_DRAWS = 2000
_LEVEL = 0.95
_SEED = 0
_NORMAL = NormalDist().inv_cdf((1 + _LEVEL) / 2)
_CHUNK = 2**22  # numbers drawn at a time

Interval = tuple[float, float]


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike) -> Interval | None:
    """The 95 % interval of a ratio of sums over rows, by drawing rows anew with replacement; None of one row.

    Source: Efron's percentile bootstrap, Efron and Tibshirani 1993, chapter 13.

    Args:
        numerators: Of each row, such as its loss in nats.
        denominators: Of each row, such as its tokens; not negative.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if len(top) < 2:
        return None
    ratios = np.concatenate([_ratio(top[drawn], bottom[drawn]) for drawn in _draws(len(top))])
    low, high = np.quantile(ratios, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One model less another on the same rows.

    Attributes:
        difference: Of the ratios of sums.
        interval: 95 %, by drawing rows; None of one row.
        p: How often a difference at least as large comes when each row's sign is tossed: a test by permutation of
            paired rows, two-sided.
        rows: Rows of both.
    """

    difference: float
    interval: Interval | None
    p: float
    rows: int


def paired_difference(first: ArrayLike, second: ArrayLike, denominators: ArrayLike) -> Difference:
    """`first` less `second`, each the ratio of a sum over rows to the sum of the denominators.

    Args:
        first: Of each row by one model, such as its loss in nats.
        second: Of the same rows by the other.
        denominators: Of each row, the same for both models.

    Raises:
        DataError: There is no row, or their numbers differ.
    """
    one, other, bottom = (np.asarray(each, dtype=np.float64) for each in (first, second, denominators))
    if not (len(one) == len(other) == len(bottom) > 0):
        raise DataError(
            f"a comparison needs the same rows of both, at least one, got {len(one)} and {len(other)} of {len(bottom)}."
        )
    change = one - other
    random = np.random.default_rng(_SEED)
    found, reached = abs(change.sum()), 0
    for start in range(0, _DRAWS, step := max(1, _CHUNK // len(change))):
        signs = random.choice((-1.0, 1.0), size=(min(step, _DRAWS - start), len(change)))
        reached += int((np.abs(signs @ change) >= found * (1 - 1e-12)).sum())
    return Difference(
        difference=float(change.sum() / bottom.sum()),
        interval=ratio_interval(change, bottom),
        p=(1 + reached) / (1 + _DRAWS),
        rows=len(change),
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values made larger for being several, so that any one below 0.05 is rarely so by chance.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    adjusted, most = dict[str, float](), 0.0
    for place, (name, p) in enumerate(ordered):
        most = max(most, min(1.0, p * (len(ordered) - place)))
        adjusted[name] = most
    return {name: adjusted[name] for name in p_values}


def share_interval(right: int, rows: int) -> Interval:
    """The 95 % interval of a share, which is wide for few rows also where all or none are right.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Raises:
        DataError: Not 0 <= right <= rows, or no row.
    """
    if not 0 <= right <= rows or not rows:
        raise DataError(f"a share needs at least one row and no more right ones than rows, got {right} of {rows}.")
    share, spread = right / rows, _NORMAL**2 / rows
    middle = (share + spread / 2) / (1 + spread)
    half = _NORMAL * math.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of a mean over rows; None where all are alike, of which draws tell nothing."""
    return ratio_interval(values, np.ones(len(values))) if len(set(values)) > 1 else None


def _draws(rows: int) -> Iterator[NDArray[np.int64]]:
    """Places of rows drawn with replacement, (draws, rows) in parts."""
    random, step = np.random.default_rng(_SEED), max(1, _CHUNK // rows)
    return (random.integers(rows, size=(min(step, _DRAWS - start), rows)) for start in range(0, _DRAWS, step))


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    total = bottom.sum(1)
    return np.divide(top.sum(1), total, out=np.zeros(len(total)), where=total > 0)
