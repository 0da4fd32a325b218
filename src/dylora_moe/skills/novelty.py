"""Is a sample of prompts of a kind that is known? One interface, three ways to decide. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dylora_moe.errors import DataError
from dylora_moe.skills.separation import Floats, draw_chance, separate, shrinkage, unit_rms

MIN_ROWS = 20
"""Rows that a decision needs: with 20 of each kind the score of samples of one kind deviates by 0.13 (docs/log.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Novelty:
    """What a detector found.

    Attributes:
        distances: Known skill -> how far the sample is from it, in the detector's own measure; larger is farther.
        nearest: The skill with the smallest, and of those at one distance that of the nearest mean; None when none is
            known.
        threshold: What the distance to the nearest must exceed to be of another kind.
    """

    distances: Mapping[str, float]
    nearest: str | None
    threshold: float

    @property
    def is_new(self) -> bool:
        """True when the sample is of no known kind."""
        return self.nearest is None or self.distances[self.nearest] > self.threshold


class Detector(Protocol):
    """Compares a sample with known ones."""

    def judge(self, sample: NDArray[np.floating], known: Mapping[str, NDArray[np.floating]]) -> Novelty:
        """Compare.

        Args:
            sample: (rows, features), at least `MIN_ROWS` rows.
            known: Skill -> (rows, features), as many rows at least.

        Raises:
            DataError: There are too few rows to decide.
        """
        ...


_LEAST_DIFFERENCE = 0.7
"""AUROC up to which a difference does not matter, however sure it is: with 100 rows each, samples of one skill had 0.66
at most in 60 decisions, and new skills 0.80 at least in 320 (docs/log.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSample:
    """Can a linear classifier tell the sample from the nearest skill, on rows that it did not see?

    The distance is the AUROC of `separate`; the threshold that of the nearest skill, calibrated on labels drawn by
    chance: samples of a known kind exceed it at the stated rate, or less often where the least difference that matters
    is more than that.
    """

    false_growth_rate: float = 0.01
    folds: int = 5
    draws: int = 100
    seed: int = 0

    def judge(self, sample: NDArray[np.floating], known: Mapping[str, NDArray[np.floating]]) -> Novelty:
        """As `Detector.judge`."""
        _check_rows(sample, known)
        distances = {name: separate(rows, sample, folds=self.folds, seed=self.seed) for name, rows in known.items()}
        if not known:
            return Novelty(distances=distances, nearest=None, threshold=0.5)
        nearest = _nearest(distances, sample, known)
        chance = draw_chance(known[nearest], sample, folds=self.folds, draws=self.draws, seed=self.seed)
        threshold = max(chance.threshold(self.false_growth_rate), _LEAST_DIFFERENCE)
        return Novelty(distances=distances, nearest=nearest, threshold=threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mahalanobis:
    """How far the sample's mean is from a skill's, in deviations that chance gives, under one shrunk covariance.

    The distance is the squared Mahalanobis distance of the means over what two samples of one kind of these sizes
    have on average: 1 when they are of one kind.
    """

    threshold: float = 2.0

    def judge(self, sample: NDArray[np.floating], known: Mapping[str, NDArray[np.floating]]) -> Novelty:
        """As `Detector.judge`."""
        _check_rows(sample, known)
        samples = {name: unit_rms(rows) for name, rows in known.items()}
        new = unit_rms(sample)
        inverse = np.linalg.inv(shared_covariance([*samples.values(), new]))
        distances = {}
        for name, rows in samples.items():
            difference = new.mean(0) - rows.mean(0)
            scatter = sum(
                ((part - part.mean(0)) @ inverse * (part - part.mean(0))).sum() / (len(part) - 1) / len(part)
                for part in (rows, new)
            )
            distances[name] = float(difference @ inverse @ difference / scatter)
        nearest = _nearest(distances, sample, known) if known else None
        return Novelty(distances=distances, nearest=nearest, threshold=self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine:
    """One minus the cosine between mean features, against a fixed threshold: the rule of the first design.

    For comparison only: means of different domains are nearer to each other than that (docs/log.md).
    """

    threshold: float = 0.25

    def judge(self, sample: NDArray[np.floating], known: Mapping[str, NDArray[np.floating]]) -> Novelty:
        """As `Detector.judge`."""
        _check_rows(sample, known)
        distances = {name: 1 - _cosine(sample.mean(0), rows.mean(0)) for name, rows in known.items()}
        nearest = _nearest(distances, sample, known) if known else None
        return Novelty(distances=distances, nearest=nearest, threshold=self.threshold)


def shared_covariance(samples: list[Floats]) -> Floats:
    """Covariance within the samples, (features, features), shrunk as `shrinkage` says."""
    within = np.concatenate([rows - rows.mean(0) for rows in samples])
    freedom, features = max(1, len(within) - len(samples)), within.shape[1]
    covariance = within.T @ within / freedom
    trace = float(np.trace(covariance))
    share = shrinkage(trace, float(np.sum(covariance**2)), freedom, features)
    covariance *= 1 - share
    covariance[np.diag_indices(features)] += max(share * trace / features, 1e-12)
    return covariance


def _cosine(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _nearest(
    distances: Mapping[str, float], sample: NDArray[np.floating], known: Mapping[str, NDArray[np.floating]]
) -> str:
    """Samples that a detector tells apart without a mistake are all at one distance."""
    mean = unit_rms(sample).mean(0)
    apart = {name: float(np.linalg.norm(unit_rms(rows).mean(0) - mean)) for name, rows in known.items()}
    return min(distances, key=lambda name: (distances[name], apart[name]))


def _check_rows(sample: NDArray[np.floating], known: Mapping[str, NDArray[np.floating]]) -> None:
    for name, rows in {"the new data": sample, **known}.items():
        if len(rows) < MIN_ROWS:
            raise DataError(
                f"A decision on novelty needs at least {MIN_ROWS} rows of each kind, got {len(rows)} of {name}. Add "
                "rows, or say what to do with them."
            )
