"""Known kinds are known, new ones are new, and the nearest is the right one; by each detector as far as it can."""

import numpy as np
import pytest

from dylora_moe.errors import DataError
from dylora_moe.skills.novelty import MIN_ROWS, Cosine, Detector, Mahalanobis, TwoSample, shared_covariance

FEATURES = 32
# Domains of one model: a large common direction, small differences.
COMMON = np.random.default_rng(7).normal(size=FEATURES) * 6
KINDS = {name: np.random.default_rng(index).normal(size=FEATURES) for index, name in enumerate("abcd")}


def draw(kind: str, rows: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(rows, FEATURES))
    return (COMMON + KINDS[kind] + noise).astype(np.float32)


KNOWN = {kind: draw(kind, 40, seed) for seed, kind in enumerate("abc")}
DETECTORS = [TwoSample(), Mahalanobis()]


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: type(detector).__name__)
@pytest.mark.parametrize("kind", KNOWN)
def test_another_sample_of_a_known_kind_is_known(detector: Detector, kind: str) -> None:
    found = detector.judge(draw(kind, 30, seed=50), KNOWN)
    assert not found.is_new and found.nearest == kind
    assert set(found.distances) == set(KNOWN)


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: type(detector).__name__)
def test_a_new_kind_is_new(detector: Detector) -> None:
    assert detector.judge(draw("d", 30, seed=50), KNOWN).is_new


def test_a_fixed_cosine_misses_it() -> None:
    """The reason for the two-sample test: the common direction hides what differs."""
    assert not Cosine().judge(draw("d", 30, seed=50), KNOWN).is_new
    far = -draw("d", 30, seed=50)
    found = Cosine().judge(far, KNOWN)
    assert found.is_new and found.distances["a"] > 1.5


@pytest.mark.parametrize("detector", [*DETECTORS, Cosine()], ids=lambda detector: type(detector).__name__)
def test_the_first_kind_is_new(detector: Detector) -> None:
    found = detector.judge(draw("a", MIN_ROWS, seed=0), {})
    assert found.is_new and found.nearest is None


def test_the_stated_rate_bounds_false_growth() -> None:
    """Repeats of 60 seeds at 5 %: a binomial of 60 exceeds 8 in less than one of 100 cases."""
    new = sum(
        TwoSample(false_growth_rate=0.05, seed=s).judge(draw("b", 40, seed=100 + s), KNOWN).is_new for s in range(60)
    )
    assert new <= 8


@pytest.mark.parametrize("detector", [*DETECTORS, Cosine()], ids=lambda detector: type(detector).__name__)
def test_too_few_rows_are_refused_by_name(detector: Detector) -> None:
    with pytest.raises(DataError, match=r"at least 20 rows.*got 19 of the new data"):
        detector.judge(draw("a", 19, seed=0), KNOWN)
    with pytest.raises(DataError, match=r"got 3 of x"):
        detector.judge(draw("a", 20, seed=0), {"x": draw("a", 3, seed=0)})


@pytest.mark.slow
def test_a_small_difference_does_not_matter_however_sure_it_is() -> None:
    """Means apart by so much of a deviation that 64 % of pairs tell: with 600 rows each, chance alone gives 54 %."""
    draw = np.random.default_rng(0)
    known, sample = draw.normal(size=(600, 4)) + 1, draw.normal(size=(600, 4)) + 1
    for apart, is_new in ((0.5, False), (2.0, True)):
        moved = sample + apart * np.eye(4)[0]
        found = TwoSample().judge(moved, {"x": known})
        assert found.is_new is is_new and found.threshold == 0.7
        assert found.distances["x"] > 0.58


def test_the_shared_covariance_is_that_within_the_samples() -> None:
    samples = [draw("a", 4000, seed=1).astype(float), draw("b", 4000, seed=2).astype(float)]
    np.testing.assert_allclose(shared_covariance(samples), np.eye(FEATURES), atol=0.08)


def test_of_skills_at_one_distance_the_nearest_mean_is_the_nearest() -> None:
    draw = np.random.default_rng(0)
    sample = draw.normal(size=(40, 8)) * 0.05 + np.eye(8)[0]
    known = {
        name: draw.normal(size=(40, 8)) * 0.05 + centre
        for name, centre in {"far": np.eye(8)[1], "near": np.eye(8)[0] + 0.8 * np.eye(8)[1]}.items()
    }
    found = TwoSample().judge(sample, known)
    assert found.distances["far"] == found.distances["near"] == 1.0
    assert found.nearest == "near"
