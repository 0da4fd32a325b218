"""How well a linear discriminant tells two samples of features apart: about 0.5 when they are of one kind. Pure.

Everything is computed from the products of the rows with each other, so its cost grows with the rows and not with the
features, and drawing the labels anew, which tells what chance alone gives, costs no more products.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """What `separate` gives for samples of one kind, as drawn.

    Attributes:
        mean: Of the draws.
        deviation: Of the draws.
        draws: How many there were.
    """

    mean: float
    deviation: float
    draws: int

    def threshold(self, rate: float) -> float:
        """What samples of one kind stay below, but for so small a share of them.

        The upper end of the prediction interval of one more draw: mean and deviation are themselves drawn.

        Args:
            rate: That share, above 0 and below 1.
        """
        quantile = student_quantile(1 - rate, self.draws - 1)
        return self.mean + quantile * math.sqrt(1 + 1 / self.draws) * self.deviation


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, to 1 % from five degrees of freedom at 0.99 on.

    Source: Fisher and Cornish, The Percentile Points of Distributions Having Known Cumulants, 1960.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def unit_rms(sample: NDArray[np.floating]) -> Floats:
    """Rows, (rows, features), each at a root mean square of one: lengths of hidden states tell little of a prompt."""
    rows = np.asarray(sample, np.float64)
    return rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True)).clip(1e-12)


def separate(one: NDArray[np.floating], other: NDArray[np.floating], *, folds: int, seed: int) -> float:
    """AUROC of the discriminant between two samples on rows that it was not fitted to, the mean over folds.

    Args:
        one: (rows, features), at least two rows in each fold.
        other: (rows, features), as many at least.
        folds: Parts of each sample; each is held out once.
        seed: Decides the parts.
    """
    gram, is_other, features = _products(one, other)
    return _mean_auroc(gram, is_other, features, folds, np.random.default_rng(seed))


def draw_chance(one: NDArray[np.floating], other: NDArray[np.floating], *, folds: int, draws: int, seed: int) -> Chance:
    """What `separate` would give if both samples were of one kind: labels are drawn anew, two times at least."""
    gram, is_other, features = _products(one, other)
    draw = np.random.default_rng(seed)
    found = [_mean_auroc(gram, draw.permutation(is_other), features, folds, draw) for _ in range(draws)]
    return Chance(mean=float(np.mean(found)), deviation=float(np.std(found, ddof=1)), draws=draws)


def _products(one: NDArray[np.floating], other: NDArray[np.floating]) -> tuple[Floats, NDArray[np.bool_], int]:
    rows = unit_rms(np.concatenate([one, other]))
    return rows @ rows.T, np.arange(len(rows)) >= len(one), rows.shape[1]


def _mean_auroc(
    gram: Floats, is_other: NDArray[np.bool_], features: int, folds: int, draw: np.random.Generator
) -> float:
    fold = np.empty(len(gram), np.int64)
    for label in (False, True):
        places = np.flatnonzero(is_other == label)
        fold[draw.permutation(places)] = np.arange(len(places)) % folds
    found = []
    for index in range(folds):
        fitted, held = np.flatnonzero(fold != index), np.flatnonzero(fold == index)
        weights = discriminant(gram[np.ix_(fitted, fitted)], is_other[fitted], features)
        scores = gram[np.ix_(held, fitted)] @ weights
        found.append(auroc(scores[~is_other[held]], scores[is_other[held]]))
    return float(np.mean(found))


def discriminant(gram: Floats, is_other: NDArray[np.bool_], features: int) -> Floats:
    """Fisher's direction from one sample to the other, their shared covariance shrunk, as weights of the rows.

    The covariance within the samples is (1 - s) S + s t I, t its mean variance, and s as `shrinkage` says. Its
    inverse times the difference of the means is solved among the rows by Woodbury's identity.

    Args:
        gram: (rows, rows), products of the rows.
        is_other: (rows,), which sample each is of.
        features: Of a row.
    """
    rows = len(gram)
    share = np.stack([~is_other, is_other]) / np.stack([~is_other, is_other]).sum(1, keepdims=True)
    difference = share[1] - share[0]
    centre = np.eye(rows) - share[is_other.astype(np.int64)]  # of its own sample
    freedom = rows - 2
    within = centre @ gram @ centre.T / freedom
    trace = float(np.trace(within))
    if trace <= 1e-12:  # all rows of a sample are alike
        return difference
    shrunk = shrinkage(trace, float(np.sum(within**2)), freedom, features)
    floor, kept = shrunk * trace / features, 1 - shrunk
    inner = floor * np.eye(rows) + kept * within
    correction = centre.T @ np.linalg.solve(inner, centre @ (gram @ difference))
    return (difference - kept / freedom * correction) / floor


def shrinkage(trace: float, squared_trace: float, freedom: int, features: int) -> float:
    """Share of a covariance to replace by its mean variance, 0 to 1, that brings it nearest to the true one.

    Oracle approximating shrinkage: Chen, Wiesel, Eldar, Hero, Shrinkage Algorithms for MMSE Covariance Estimation,
    2010, equation 23.

    Args:
        trace: Of the sample covariance.
        squared_trace: Trace of its square.
        freedom: Rows that it was estimated from, less the means.
        features: Its size.
    """
    spread = squared_trace - trace**2 / features
    if spread <= 0:  # all variances are alike as it is
        return 1.0
    return min(1.0, ((1 - 2 / features) * squared_trace + trace**2) / ((freedom + 1 - 2 / features) * spread))


def auroc(negative: Floats, positive: Floats) -> float:
    """Probability that a score of `positive` is above one of `negative`; equal ones count half."""
    _, place, counts = np.unique(np.concatenate([negative, positive]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    surplus = ranks[len(negative) :].sum() - len(positive) * (len(positive) + 1) / 2
    return float(surplus / (len(negative) * len(positive)))
