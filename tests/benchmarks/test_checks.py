"""benchmarks/checks.py on the real data: its bars are those that the checks are for."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside the repository")


@pytest.fixture(scope="module")
def checks(load: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("wordfreq", reason="levels need the extra `levels`")
    return load("checks")


@pytest.fixture(scope="module")
def record(checks: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("checks") / "checks.json"
    done = CliRunner().invoke(checks.main, ["--data", str(SHARED), "--out", str(out)], catch_exceptions=False)
    assert "weighted kappa" in done.output and "repeats_question" in done.output
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("check", "missed", "alarms"),
    [
        ("language", 0.01, 0.01),
        ("repeats_question", 0.06, 0.01),
        ("refusal", 0.0, 0.001),
        ("marks", 0.0, 0.001),
        ("near_copy", 0.1, 0.001),
        ("template, 20% of the answers", 0.05, 0.02),
        ("template, 50% of the answers", 0.05, 0.02),
    ],
)
def test_what_is_put_in_is_found_and_people_are_left_alone(
    record: dict[str, Any], check: str, missed: float, alarms: float
) -> None:
    found = record["checks"][check]
    for each in found["put in"].values():
        assert each["found"] >= (1 - missed) * each["of"] > 0
    for each in found["people"].values():
        assert each["found"] <= alarms * each["of"] and each["of"] > 100


def test_levels_agree_with_a_list_of_words_better_than_length_does(record: dict[str, Any]) -> None:
    whole, length = record["levels"]["all that is counted"], record["levels"]["length of sentences alone"]
    assert whole["kappa"] > 0.7 and whole["kappa"] > length["kappa"] + 0.05
    assert sum(map(sum, whole["counts"])) == 600 and whole["within one level"] > 0.8


def test_levelled_passages_are_written(checks: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "levelled.jsonl"
    done = CliRunner().invoke(checks.main, ["--data", str(SHARED), "--levelled", str(path)], catch_exceptions=False)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1200 and {row["level"] for row in rows} == set(checks.LEVELS) and "1,200" in done.output
