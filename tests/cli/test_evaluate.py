"""`dylora evaluate`: routed, one expert forced, the base alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Path:
    """A copy, since figures are kept in the folder."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def losses(evaluation: Any) -> dict[str, float]:
    return {each["domain"]: each["loss"] for each in evaluation["domains"]}


def test_a_run_has_the_losses_that_its_training_ended_with(dylora: Run, run: Path, finished: Any) -> None:
    found = dylora("evaluate", run, "--json").json()["routed"]
    assert losses(found) == pytest.approx(losses(finished.result["after"]), rel=1e-5)
    assert found["routing"]["load"] == pytest.approx(finished.result["after"]["routing"]["load"], abs=1e-6)
    assert json.loads((run / "eval" / "routed.json").read_text()) == found


def test_the_base_alone_has_the_losses_that_training_began_with(dylora: Run, run: Path, finished: Any) -> None:
    found = dylora("evaluate", run, "--base", "--json").json()["base"]
    assert losses(found) == pytest.approx(losses(finished.result["before"]), rel=1e-5)
    assert found["routing"] is None and (run / "eval" / "base.json").is_file()


def test_experts_differ(dylora: Run, run: Path) -> None:
    names = [f"expert_{index}" for index in range(2)]
    found = [dylora("evaluate", run, "--expert", name, "--json").json()[f"expert-{name}"] for name in names]
    assert losses(found[0]) != losses(found[1]) and found[0]["routing"] is None
    assert sorted(path.name for path in (run / "eval").glob("*.json")) == [
        "expert-expert_0.json",
        "expert-expert_1.json",
    ]


def test_people_read_tables(dylora: Run, run: Path) -> None:
    outcome = dylora("evaluate", run)
    assert outcome.code == 0 and outcome.err == ""
    for shown in (
        "loss on validation rows",
        "The base alone",
        "The mixture",
        "95 % interval",
        "perplexity",
        "capitals",
        "Which expert serves which domain",
        "dead experts",
    ):
        assert shown in outcome.out
    assert "Which expert" not in dylora("evaluate", run, "--base").out


def test_an_expert_that_is_not_there_is_told(dylora: Run, run: Path) -> None:
    outcome = dylora("evaluate", run, "--expert", "nobody", "--json")
    assert outcome.code == 1 and outcome.out == "" and "no expert 'nobody'; there are expert_0" in outcome.err
