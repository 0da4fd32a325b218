"""Where does a stream of rows change skill? Features in the order of arrival in, first rows of skills out. Pure.

The rows before and after many places are told apart as two samples are. The places where that is best and above
chance are moved to the row where the discriminant's scores turn, and those that then divide rows of one kind go.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dylora_moe.errors import ConfigError, DataError
from dylora_moe.skills.library import Features
from dylora_moe.skills.novelty import MIN_ROWS
from dylora_moe.skills.separation import Chance, Floats, discriminant, draw_chance, separate, unit_rms

_FOLDS = 5
_STEPS = 10
"""Places looked at in the length of a window: two of them one apart share nine tenths of their rows."""
_DRAWS = 200
_DRAWS_EACH = 4
_MOVES = 5
"""Times that a place may move; on real streams it stands still after two or three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """The rows, and how they are compared."""

    rows: Features
    window: int
    least: int
    seed: int

    def sides(self, before: int, place: int, after: int) -> tuple[Features, Features]:
        """The rows on both sides of a place, a window at most and not beyond the two others."""
        first, end = max(before, place - self.window), min(after, place + self.window)
        return self.rows[first:place], self.rows[place:end]

    def score(self, before: int, place: int, after: int) -> float:
        """How far the AUROC of the two sides is from one half, in `_unit`s."""
        one, other = self.sides(before, place, after)
        return (separate(one, other, folds=_FOLDS, seed=self.seed) - 0.5) / _unit(len(one), len(other))


def find_changes(
    features: Features, *, window: int = 100, least: int = MIN_ROWS, rate: float = 0.01, seed: int = 0
) -> tuple[int, ...]:
    """The rows at which another skill begins, in order, without row 0.

    A skill that lasts for less than about half a window between two others, or between two parts of one, is missed.
    Rows of one skill must come in no order of their own: a file that is sorted changes all the time.

    Args:
        features: (rows, features), in the order in which they came.
        window: Rows compared on each side of a place.
        least: Rows of the shortest skill.
        rate: Share of streams of one skill in which any change is found, at most. It is divided by the places looked
            at (Bonferroni), since the largest of so many is in a tail that no number of shuffled streams that one can
            pay for reaches.
        seed: Decides the folds and the draws by chance.

    Raises:
        ConfigError: A setting is out of its range.
        DataError: The features are not a table of finite numbers.
    """
    _check(features, window, least, rate)
    stream = _Stream(rows=features, window=window, least=least, seed=seed)
    end = len(features)
    looked_at = list(range(least, end - least + 1, max(1, window // _STEPS)))
    if not looked_at:
        return ()
    threshold = _chance(stream, looked_at).threshold(rate / len(looked_at))
    scores = {place: stream.score(0, place, end) for place in looked_at}
    places = _highest({place: score for place, score in scores.items() if score > threshold}, least)
    return tuple(_without_false(stream, _refined(stream, places), threshold))


def _check(features: Features, window: int, least: int, rate: float) -> None:
    if features.ndim != 2 or not np.isfinite(features).all():
        raise DataError(
            f"Features must be finite numbers in two axes, (rows, features), got {features.ndim} axes of shape "
            f"{features.shape}, {np.count_nonzero(~np.isfinite(features))} values not finite. Read them again."
        )
    if least < 2 * _FOLDS:
        raise ConfigError(f"least must be {2 * _FOLDS} rows or more, got {least}. Raise it.")
    if window < least:
        raise ConfigError(f"window must be at least least={least} rows, got {window}. Raise window or lower least.")
    if not 0 < rate < 1:
        raise ConfigError(f"rate must be above 0 and below 1, got {rate}. Set for instance 0.01.")


def _unit(rows: int, others: int) -> float:
    """Standard deviation of an AUROC by chance.

    Source: Mann and Whitney, On a Test of Whether one of Two Random Variables is Stochastically Larger, 1947.
    """
    return math.sqrt((rows + others + 1) / (12 * rows * others))


def _chance(stream: _Stream, places: list[int]) -> Chance:
    """What `_Stream.score` gives by chance, from draws at places all over the stream.

    In these units it is the same for all places and sizes: deviation 1.28 to 1.43 for 20 to 100 rows of one real skill
    or of two on either side (docs/log.md). So a tail is known from all draws together, and none are made at each place.
    """
    chosen = np.linspace(0, len(places) - 1, _DRAWS // _DRAWS_EACH).round().astype(np.int64)
    found = []
    for draw, index in enumerate(chosen.tolist()):
        one, other = stream.sides(0, places[index], len(stream.rows))
        drawn = draw_chance(one, other, folds=_FOLDS, draws=_DRAWS_EACH, seed=stream.seed + draw)
        unit = _unit(len(one), len(other))
        found.append(((drawn.mean - 0.5) / unit, drawn.deviation / unit))
    means, deviations = np.array(found).T
    mean, draws = means.mean(), len(found) * _DRAWS_EACH
    squares = (_DRAWS_EACH - 1) * (deviations**2).sum() + _DRAWS_EACH * ((means - mean) ** 2).sum()
    return Chance(mean=float(mean), deviation=math.sqrt(squares / (draws - 1)), draws=draws)


def _highest(scores: dict[int, float], apart: int) -> list[int]:
    """Places whose score none nearer than so many rows exceeds; of equal ones the first."""
    found: list[int] = []
    for place, score in scores.items():
        near = {other: value for other, value in scores.items() if abs(other - place) < apart}
        if score == max(near.values()) and (not found or place - found[-1] >= apart):
            found.append(place)
    return found


def _refined(stream: _Stream, places: list[int]) -> list[int]:
    """The places, each moved to the row where the scores of the rows between its neighbours turn."""
    refined = list(places)
    for _ in range(_MOVES):
        before = list(refined)
        for index, place in enumerate(refined):
            neighbours = _neighbours(refined, index, len(stream.rows))
            refined[index] = _moved(stream, neighbours[0], place, neighbours[1])
        if refined == before:
            break
    return refined


def _neighbours(places: list[int], index: int, end: int) -> tuple[int, int]:
    return ([0, *places][index], [*places, end][index + 1])


def _moved(stream: _Stream, before: int, place: int, after: int) -> int:
    """Where to divide the rows so that those of each side have its scores, each bounded by the side's middle."""
    one, other = stream.sides(before, place, after)
    is_other = np.arange(len(one) + len(other)) >= len(one)
    scores = _held_out_scores(np.concatenate([one, other]), is_other)
    low, high = float(np.median(scores[~is_other])), float(np.median(scores[is_other]))
    if low >= high:
        return place
    sides = np.clip((2 * scores - low - high) / (high - low), -1, 1)
    first = max(before + stream.least, place - len(one) + 1)
    last = min(after - stream.least, place + len(other) - 1)
    totals = np.cumsum(sides)[first - place + len(one) - 1 : last - place + len(one)]
    return first + int(np.argmin(totals))


def _held_out_scores(sample: Features, is_other: NDArray[np.bool_]) -> Floats:
    """Of each row, by a discriminant that was not fitted to it."""
    rows = unit_rms(sample)
    gram, fold, scores = rows @ rows.T, np.arange(len(rows)) % _FOLDS, np.empty(len(rows))
    for index in range(_FOLDS):
        fitted, held = np.flatnonzero(fold != index), np.flatnonzero(fold == index)
        weights = discriminant(gram[np.ix_(fitted, fitted)], is_other[fitted], rows.shape[1])
        scores[held] = gram[np.ix_(held, fitted)] @ weights
    return scores


def _without_false(stream: _Stream, places: list[int], threshold: float) -> list[int]:
    """The places less those whose two neighbouring segments are of one kind, the least certain first."""
    while places:
        around = [_neighbours(places, index, len(stream.rows)) for index in range(len(places))]
        scores = [stream.score(before, place, after) for place, (before, after) in zip(places, around, strict=True)]
        worst = int(np.argmin(scores))
        if scores[worst] > threshold:
            break
        places = _refined(stream, [*places[:worst], *places[worst + 1 :]])
    return places
