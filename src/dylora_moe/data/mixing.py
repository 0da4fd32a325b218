"""Which rows an epoch has, and in which order: a pure function of the seed and the epoch.

A mixture says how many rows of each domain an epoch has. A domain is walked through in passes, each in another order
and with each row once; an epoch goes on where the last one stopped, so no row comes twice before all came once.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dylora_moe.errors import DataError

Order = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixture:
    """Rows of each domain, and how many of them an epoch has.

    Attributes:
        rows: For each domain, the indices of its rows.
        quotas: For each domain, how many rows an epoch draws; more than it has where it is drawn again.
    """

    rows: tuple[Order, ...]
    quotas: tuple[int, ...]

    def __len__(self) -> int:
        """Rows in an epoch."""
        return sum(self.quotas)


def concatenate(domains: ArrayLike) -> Mixture:
    """Every row once an epoch; `domains` says, row for row, which domain it belongs to."""
    rows = _rows_by_domain(domains)
    return Mixture(rows=rows, quotas=tuple(map(len, rows)))


def interleave(domains: ArrayLike) -> Mixture:
    """Two domains in turn, row by row, until every row of the larger one came once; the smaller one is repeated.

    Raises:
        DataError: There are not exactly two domains.
    """
    rows = _rows_by_domain(domains)
    if len(rows) != 2:
        raise DataError(
            f"interleaved_sampling takes exactly two domains, got {len(rows)}. Give weights or a temperature, or "
            "merge data sets into two domains."
        )
    return Mixture(rows=rows, quotas=(max(map(len, rows)),) * 2)


def weigh(domains: ArrayLike, weights: Sequence[float], *, num_rows: int | None = None) -> Mixture:
    """Domains in given shares of an epoch.

    Args:
        domains: Of each row.
        weights: One positive number a domain; only their ratios matter.
        num_rows: Rows in an epoch; None for as many as there are.

    Raises:
        DataError: The weights do not fit the domains, or leave one without any row in an epoch.
    """
    rows = _rows_by_domain(domains)
    if len(weights) != len(rows) or not all(0 < weight < math.inf for weight in weights):
        raise DataError(
            f"Sampling weights must be one positive number for each of the {len(rows)} domains, got {list(weights)}. "
            "Leave a data set out of the recipe to weigh it zero."
        )
    drawn = quotas(weights, sum(map(len, rows)) if num_rows is None else num_rows)
    if 0 in drawn:
        raise DataError(
            f"Sampling weights must give every domain at least one row in an epoch, got {list(weights)} for "
            f"{sum(drawn)} rows, which leaves domain number {drawn.index(0)} none. Raise its weight."
        )
    return Mixture(rows=rows, quotas=drawn)


def temper(domains: ArrayLike, temperature: float) -> Mixture:
    """Domains in shares of n_i^(1/T), for n_i rows: T=1 as concatenation, larger T closer to equal shares.

    Source: multilingual BERT's exponential smoothing; as a temperature in arXiv 1907.05019.

    Raises:
        DataError: The temperature is below 1.
    """
    if not 1 <= temperature < math.inf:
        raise DataError(
            f"The temperature of sampling must be at least 1, got {temperature}. 1 draws rows as they are; 2 to 5 "
            "help small domains."
        )
    return weigh(domains, [len(rows) ** (1 / temperature) for rows in _rows_by_domain(domains)])


def epoch_order(mixture: Mixture, *, seed: int, epoch: int) -> Order:
    """The rows of an epoch in order, domains spread evenly: equal quotas alternate strictly.

    Row k of a domain, counted over all epochs, is number k % n of its pass k // n, with n rows in the domain.
    """
    drawn = [
        _draw(rows, quota, start=epoch * quota, name=f"{seed}/{domain}")
        for domain, (rows, quota) in enumerate(zip(mixture.rows, mixture.quotas, strict=True))
    ]
    if not drawn:
        return np.zeros(0, dtype=np.int64)
    # Each row stands in the middle of its part of the epoch; of two at one place the earlier domain's comes first.
    slots = [(2 * np.arange(quota) + 1) / (2 * quota) for quota in mixture.quotas]
    return np.concatenate(drawn)[np.argsort(np.concatenate(slots), kind="stable")]


def shuffled(number: int, name: str) -> Order:
    """0 to number - 1 in an order that the name decides, the same under every version of Python."""
    # Of Random's methods only random() promises the same values for ever; text seeds are hashed whole, so that
    # neighbouring seeds and epochs have nothing in common.
    draw = random.Random(name).random
    return np.argsort(np.fromiter((draw() for _ in range(number)), np.float64, number), kind="stable")


def _rows_by_domain(domains: ArrayLike) -> tuple[Order, ...]:
    domain_of_row = np.asarray(domains, dtype=np.int64)
    rows = tuple(np.flatnonzero(domain_of_row == domain) for domain in range(domain_of_row.max(initial=-1) + 1))
    missing = [domain for domain, found in enumerate(rows) if not len(found)]
    if missing:
        raise DataError(f"Every domain must have training rows, got none of domain number {missing[0]}. Add rows.")
    return rows


def quotas(weights: Sequence[float], num_rows: int) -> tuple[int, ...]:
    """Whole numbers in the ratio of the weights that add up to `num_rows`, by largest remainders."""
    parts = [weight / max(weights) for weight in weights]  # the sum of very large ones would be infinite
    exact = [part / sum(parts) * num_rows for part in parts]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: quotas[index] - exact[index])
    for index in by_remainder[: num_rows - sum(quotas)]:
        quotas[index] += 1
    return tuple(quotas)


def _draw(rows: Order, quota: int, *, start: int, name: str) -> Order:
    """Rows number start to start + quota - 1 of the domain's passes, one after the other."""
    drawn = []
    for number in range(start // len(rows), -(-(start + quota) // len(rows))):
        order = shuffled(len(rows), f"{name}/{number}")
        first = max(start - number * len(rows), 0)
        last = min(start + quota - number * len(rows), len(rows))
        drawn.append(rows[order[first:last]])
    return np.concatenate(drawn)
