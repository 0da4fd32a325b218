"""From samples of skills to what a prototype router needs: a space, a centre for each skill, and how far it reaches.

Linear discriminant analysis with equal priors: where the covariance within the skills is the identity, the space
that the skills' means span. The nearest centre there is the skill that it names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dylora_moe.errors import DataError
from dylora_moe.skills.novelty import shared_covariance
from dylora_moe.skills.separation import Floats, shrinkage, unit_rms

_MIN_ROWS = 2  # one to fit to, one to hold out

# Means whose differences, squared and whitened, are less than this part of the largest are alike.
_ALIKE = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Prototypes:
    """Where skills lie, in a space whose unit is the deviation within a skill.

    Attributes:
        skills: Names, in the order of all arrays.
        projection: From features of unit root mean square to that space, (features, dimensions), float32; as many
            dimensions as skills less one, or fewer where means are alike.
        centres: (skills, dimensions), float32.
        radii: Distance that a prompt of the skill seldom exceeds, (skills,), float32.
    """

    skills: tuple[str, ...]
    projection: NDArray[np.float32]
    centres: NDArray[np.float32]
    radii: NDArray[np.float32]


def fit_prototypes(
    samples: Mapping[str, NDArray[np.floating]], *, unsure_rate: float, folds: int = 5, seed: int = 0
) -> Prototypes:
    """Fit them to samples of all skills.

    A radius is a conformal quantile of the distances of rows that were not fitted to, of those that land at their own
    skill. Where there are too few of them for so small a share, it is the largest: then the share of known prompts
    outside is at most 1 / (rows + 1). With one skill all distances are 0, and all lie within.

    Args:
        samples: Skill -> (rows, features), two rows at least.
        unsure_rate: Share of a skill's own prompts to lie outside its radius, 0 to 1. With 0 the radii are infinite.
        folds: Parts of each sample, two at least; each is held out once.
        seed: Decides the parts.

    Raises:
        DataError: There is no skill, or one has too few rows.
    """
    if not samples:
        raise DataError("Prototypes need at least one skill, got none.")
    for name, sample in samples.items():
        if len(sample) < _MIN_ROWS:
            raise DataError(
                f"A skill's prototype needs at least {_MIN_ROWS} prompts, got {len(sample)} of {name}. Add rows."
            )
    if not 0 <= unsure_rate < 1:
        raise DataError(f"unsure_rate must be at least 0 and below 1, got {unsure_rate}. 0.02 is a common choice.")
    rows = [unit_rms(sample) for sample in samples.values()]
    projection, centres = discriminant_space(rows)
    distances = _held_out_distances(rows, folds, np.random.default_rng(seed)) if unsure_rate else [None] * len(rows)
    radii = [math.inf if found is None else conformal_quantile(found, unsure_rate) for found in distances]
    return Prototypes(
        skills=tuple(samples),
        projection=projection.astype(np.float32),
        centres=centres.astype(np.float32),
        radii=np.asarray(radii, np.float32),
    )


def discriminant_space(samples: Sequence[Floats], gram: Floats | None = None) -> tuple[Floats, Floats]:
    """Projection (features, dimensions) to the space that whitened means span, and the means there.

    With M the means less their mean, S the covariance within, and U s^2 U' the eigenvalues of M S^-1 M', it is
    S^-1 M' U / s: S^-1 times a few columns, and no square root of S.

    Args:
        samples: (rows, features) of each skill.
        gram: Products of all their rows, for who has them already.
    """
    means = np.stack([rows.mean(0) for rows in samples])
    spread = means - means.mean(0)
    solved = _solve_within(samples, gram, spread.T)
    values, vectors = np.linalg.eigh(spread @ solved)
    keep = values > max(values[-1] * _ALIKE, np.finfo(np.float64).tiny)
    keep[0] = False  # the rows of M sum to 0, so the least value is of no direction
    projection = solved @ (vectors[:, keep] / np.sqrt(values[keep]))
    return projection, means @ projection


def _solve_within(samples: Sequence[Floats], gram: Floats | None, columns: Floats) -> Floats:
    """Inverse of the covariance within the samples, shrunk as `shared_covariance` has it, times columns.

    Where the rows are fewer than the features, by Woodbury's identity: no work grows with the features squared.
    """
    within = np.concatenate([rows - rows.mean(0) for rows in samples])
    (rows, features), freedom = within.shape, max(1, len(within) - len(samples))
    if rows >= features:
        return np.asarray(np.linalg.solve(shared_covariance(list(samples)), columns), np.float64)
    inner = within @ within.T if gram is None else _centred(gram, [len(sample) for sample in samples])
    inner /= freedom
    trace = float(np.trace(inner))
    share = shrinkage(trace, float(np.vdot(inner, inner)), freedom, features)
    floor, kept = max(share * trace / features, 1e-12), 1 - share
    inner *= kept
    inner[np.diag_indices(rows)] += floor
    return (columns - within.T @ np.linalg.solve(inner, within @ columns) * (kept / freedom)) / floor


def _centred(gram: Floats, sizes: Sequence[int]) -> Floats:
    """Products of the rows less the means of their samples, from those of the rows."""
    sample = np.repeat(np.arange(len(sizes)), sizes)
    share = np.eye(len(sizes))[sample].T / np.asarray(sizes)[:, None]
    half = gram - (share @ gram)[sample]
    half -= (half @ share.T)[:, sample]
    return half


def conformal_quantile(scores: Floats, rate: float) -> float:
    """What one more score exceeds with at most this probability; the largest where there are too few to say.

    Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, chapter 2.
    """
    rank = math.ceil((len(scores) + 1) * (1 - rate))
    return float(np.sort(scores)[min(rank, len(scores)) - 1])


def _held_out_distances(samples: Sequence[Floats], folds: int, draw: np.random.Generator) -> list[Floats]:
    """Of each sample's rows to its own centre, fitted without their fold, for those that are nearest to it.

    All of its rows where none is: two skills of the same prompts.
    """
    fold = [draw.permutation(len(rows)) % folds for rows in samples]
    places, together = np.concatenate(fold), np.concatenate(samples)
    gram = together @ together.T if len(together) < together.shape[1] else None  # once, for all folds
    own: list[list[Floats]] = [[] for _ in samples]
    landed: list[list[NDArray[np.bool_]]] = [[] for _ in samples]
    for index in range(folds):
        fitted = [rows[part != index] for rows, part in zip(samples, fold, strict=True)]
        kept = np.flatnonzero(places != index)
        projection, centres = discriminant_space(fitted, None if gram is None else gram[np.ix_(kept, kept)])
        for skill, (rows, part) in enumerate(zip(samples, fold, strict=True)):
            projected = rows[part == index] @ projection
            distances = np.linalg.norm(projected[:, None] - centres, axis=-1)
            own[skill].append(distances[:, skill])
            landed[skill].append(distances.argmin(1) == skill)
    found = []
    for distances, at_home in zip(map(np.concatenate, own), map(np.concatenate, landed), strict=True):
        found.append(distances[at_home] if at_home.any() else distances)
    return found
