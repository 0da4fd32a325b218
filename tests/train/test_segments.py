"""Skills are found in rows that nobody divided."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from tests.tiny import domain_rows, write_lines

from dylora_moe.config import RunConfig
from dylora_moe.errors import DataError, RunError
from dylora_moe.evaluate.run import evaluate_run
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train


def test_skills_are_found_where_nobody_says_where_they_begin(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    rows = [row for domain in ("capitals", "sums") for row in 3 * domain_rows(domain)]
    mixed = write_lines(tmp_path / "mixed.jsonl", rows)
    config = stream(skills=[{"skill": "mixed", "datasets": [str(mixed)], "find_changes": True}], run_name="found")
    result = train(config)
    found = RunDir(config.run_dir).read("segments/mixed/segments.json")
    assert found["rows"] == 144 and len(found["changes"]) == 1 and abs(found["changes"][0] - 72) <= 3
    assert [stage["skill"] for stage in result["stages"]] == ["mixed_1", "mixed_2"]
    assert [stage["decision"]["kind"] for stage in result["stages"]] == ["grow", "grow"]
    assert train(config)["already_finished"]
    assert len(evaluate_run(config.run_dir, tell=lambda text: None)["routed"]["domains"]) == 2


def test_a_short_stretch_has_rows_enough_for_a_decision(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Of what is found each holds rows out, and some may be copies."""
    rows = [*2 * domain_rows("capitals"), *domain_rows("sums"), *2 * domain_rows("functions")]
    mixed = write_lines(tmp_path / "mixed.jsonl", rows)
    config = stream(
        skills=[{"skill": "mixed", "datasets": [str(mixed)], "find_changes": True}], validation_split=0.4, max_steps=1
    )
    train(config)
    bounds = RunDir(config.run_dir).read("segments/mixed/segments.json")
    places = [0, *bounds["changes"], bounds["rows"]]
    assert min(stop - start for start, stop in pairwise(places)) * 0.6 >= 20


def test_found_skills_must_not_be_named_as_others(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    mixed = write_lines(tmp_path / "log.jsonl", 3 * domain_rows("capitals"))
    found = {"skill": "log", "datasets": [str(mixed)], "find_changes": True}
    config = stream(skills=[found, {"skill": "log_1", "datasets": [str(mixed)]}])
    with pytest.raises(DataError, match="different names, got 'log_1' twice"):
        train(config)
    write_lines(mixed, 3 * domain_rows("sums"))
    config = stream(skills=[found])
    train(config)
    write_lines(mixed, 3 * domain_rows("capitals"))
    with pytest.raises(RunError, match="the rows of log must be those that its skills were found in"):
        train(config)
