"""Prototypes against linear discriminant analysis written out, and radii against the share they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.errors import DataError
from dylora_moe.skills.novelty import shared_covariance
from dylora_moe.skills.prototypes import Prototypes, conformal_quantile, discriminant_space, fit_prototypes
from dylora_moe.skills.separation import unit_rms


def draw(skills: int, rows: int, features: int, seed: int = 0, apart: float = 0.6) -> dict[str, np.ndarray]:
    """Rows of skills around centres of their own, with a covariance that they share."""
    fixed, numbers = np.random.default_rng(99), np.random.default_rng(seed)
    mixing = fixed.normal(size=(features, features)) / features**0.5
    centres = fixed.normal(size=(skills, features)) * apart + 1
    return {f"skill_{i}": centres[i] + numbers.normal(size=(rows, features)) @ mixing for i in range(skills)}


def distances(prototypes: Prototypes, rows: np.ndarray) -> np.ndarray:
    projected = unit_rms(rows) @ prototypes.projection
    return np.linalg.norm(projected[:, None] - prototypes.centres, axis=-1)


@given(skills=st.integers(2, 6), rows=st.integers(3, 12), features=st.integers(8, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_nearest_centre_is_what_discriminant_analysis_says(
    skills: int, rows: int, features: int, seed: int
) -> None:
    """With fewer rows than features and with more."""
    samples = [unit_rms(sample) for sample in draw(skills, rows, features, seed).values()]
    projection, centres = discriminant_space(samples)
    assert projection.shape == (features, skills - 1) and centres.shape == (skills, skills - 1)
    inverse = np.linalg.inv(shared_covariance(samples))
    means = np.stack([sample.mean(0) for sample in samples])
    for one in range(skills):
        difference = means - means[one]
        expected = np.einsum("kd,de,ke->k", difference, inverse, difference)
        np.testing.assert_allclose(((centres - centres[one]) ** 2).sum(1), expected, rtol=1e-6, atol=1e-6)
    new = unit_rms(np.random.default_rng(seed).normal(size=(30, features)) + 1)
    squared = ((new @ projection)[:, None] - centres) ** 2
    scores = new @ inverse @ means.T - 0.5 * np.einsum("kd,de,ke->k", means, inverse, means)
    found = -0.5 * squared.sum(-1)
    np.testing.assert_allclose(
        found - found[:, :1], scores - scores[:, :1], rtol=1e-5, atol=1e-5 * np.abs(scores).max()
    )


def test_products_of_the_rows_given_change_nothing() -> None:
    samples = [unit_rms(sample) for sample in draw(3, 5, 40).values()]
    together = np.concatenate(samples)
    for found, expected in zip(
        discriminant_space(samples, together @ together.T), discriminant_space(samples), strict=True
    ):
        np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("features", [16, 400])
def test_new_prompts_go_to_their_skill_and_seldom_lie_outside(features: int) -> None:
    known, new = draw(5, 60, features), draw(5, 400, features, seed=1)
    prototypes = fit_prototypes(known, unsure_rate=0.1)
    assert prototypes.skills == tuple(known)
    assert {array.dtype for array in (prototypes.projection, prototypes.centres, prototypes.radii)} == {
        np.dtype(np.float32)
    }
    outside = []
    for index, rows in enumerate(new.values()):
        found = distances(prototypes, rows)
        assert (found.argmin(1) == index).mean() > 0.95
        outside.append((found[:, index] > prototypes.radii[index]).mean())
    assert 0.03 < np.mean(outside) < 0.13, outside


def test_prompts_of_no_skill_lie_outside() -> None:
    samples = draw(6, 60, 16)
    prototypes = fit_prototypes({name: samples[name] for name in list(samples)[:5]}, unsure_rate=0.05)
    found = distances(prototypes, samples["skill_5"])
    assert (found.min(1) > prototypes.radii[found.argmin(1)]).mean() > 0.6


def test_the_quantile_by_hand() -> None:
    scores = np.arange(1.0, 20.0)  # 19: the 5 % of 20 places is the last
    assert conformal_quantile(scores, 0.05) == 19
    assert conformal_quantile(scores, 0.1) == 18
    assert conformal_quantile(scores[::-1], 0.5) == 10
    assert conformal_quantile(scores, 0.01) == 19, "too few to say: the largest"
    assert conformal_quantile(np.array([3.0]), 0.05) == 3


@given(rate=st.floats(0.01, 0.9), rows=st.integers(1, 200))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_one_more_score_exceeds_the_quantile_at_most_so_often(rate: float, rows: int) -> None:
    """Of rows + 1 exchangeable scores each is the last one equally often."""
    scores = np.arange(rows + 1.0)
    exceeds = [score > conformal_quantile(np.delete(scores, place), rate) for place, score in enumerate(scores)]
    assert np.mean(exceeds) <= max(rate, 1 / (rows + 1)) + 1e-9


def test_one_skill_takes_everything() -> None:
    prototypes = fit_prototypes(draw(1, 20, 16), unsure_rate=0.05)
    assert prototypes.projection.shape == (16, 0) and prototypes.centres.shape == (1, 0)
    assert (distances(prototypes, draw(2, 20, 16)["skill_1"]) <= prototypes.radii).all()


def test_without_a_rate_nothing_is_unsure() -> None:
    assert np.isinf(fit_prototypes(draw(3, 20, 16), unsure_rate=0).radii).all()


@pytest.mark.parametrize("rows", [8, 60])
def test_the_same_prompts_under_two_names_are_one_place(rows: int) -> None:
    samples = draw(3, rows, 16)
    twice = fit_prototypes({**samples, "again": samples["skill_0"]}, unsure_rate=0.05)
    assert twice.projection.shape == (16, 2)
    np.testing.assert_allclose(twice.centres[0], twice.centres[3], atol=1e-4)
    assert np.isfinite(twice.radii).all() and (twice.radii > 0).all()


def test_prompts_that_are_all_alike_are_survived() -> None:
    samples = {name: np.repeat(rows[:1], 4, 0) for name, rows in draw(3, 1, 16).items()}
    prototypes = fit_prototypes(samples, unsure_rate=0.05)
    assert all(np.isfinite(array).all() for array in (prototypes.projection, prototypes.centres, prototypes.radii))
    for index, rows in enumerate(samples.values()):
        assert (distances(prototypes, rows).argmin(1) == index).all()


def test_lengths_of_features_tell_nothing() -> None:
    samples = draw(3, 20, 16)
    one = fit_prototypes(samples, unsure_rate=0.05)
    other = fit_prototypes({name: rows * 40 for name, rows in samples.items()}, unsure_rate=0.05)
    np.testing.assert_allclose(np.abs(one.projection), np.abs(other.projection), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one.radii, other.radii, rtol=1e-5)


def test_the_seed_decides_the_radii_alone() -> None:
    samples = draw(3, 20, 16)
    one, same, other = (fit_prototypes(samples, unsure_rate=0.3, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.radii, same.radii) and not np.array_equal(one.radii, other.radii)
    assert np.array_equal(one.projection, other.projection) and np.array_equal(one.centres, other.centres)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(DataError, match="at least one skill"):
        fit_prototypes({}, unsure_rate=0.05)
    with pytest.raises(DataError, match="at least 2 prompts, got 1 of few"):
        fit_prototypes({**draw(2, 5, 16), "few": np.ones((1, 16))}, unsure_rate=0.05)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="unsure_rate"):
            fit_prototypes(draw(2, 5, 16), unsure_rate=rate)
