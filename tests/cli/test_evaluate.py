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


def test_every_expert_is_told_on_every_domain(dylora: Run, run: Path) -> None:
    outcome = dylora("evaluate", run, "--experts")
    assert outcome.code == 0
    for shown in ("expert expert_0", "dense", "best expert of each row", "How alike the experts are"):
        assert shown in outcome.out
    found = dylora("evaluate", run, "--experts", "--json").json()
    assert {"measured", "matrix", "similarity"} == set(found) and (run / "eval" / "matrix.json").is_file()


def test_two_runs_are_told_side_by_side(dylora: Run, run: Path, finished: Any, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished.folder, tmp_path / "other"))
    outcome = dylora("evaluate", run, "--compare", other)
    assert outcome.code == 0 and "against" in outcome.out and "+0.000" in outcome.out
    found = dylora("evaluate", run, "--compare", other, "--json").json()
    assert [each["p"] for each in found["others"][0]["domains"]] == [1.0] * 3


def test_right_answers_are_counted(dylora: Run, run: Path) -> None:
    outcome = dylora("evaluate", run, "--answers", "--rows", "2")
    assert outcome.code == 0 and "Right answers" in outcome.out and "the whole answer" in outcome.out


def test_problems_are_solved_in_a_sandbox(dylora: Run, run: Path, tmp_path: Path) -> None:
    task = {"task_id": 11, "text": "Return 1.", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(task))
    # Asked for in so many words: the program is the reference above, or what a random model writes, which is none.
    outcome = dylora("evaluate", run, "--code", tmp_path / "mbpp.jsonl", "--sandbox", "none")
    assert outcome.code == 0
    for shown in ("pass@1", "Sandbox: none", "mbpp/11", "Return 1.", "All 1 reference solutions passed", "Verdict"):
        assert shown in outcome.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--expert", "expert_0", "--base"), "--expert and --base exclude each other"),
        (("--experts", "--answers"), "exclude each other"),
        (("--experts", "--base"), "leave them out with --experts"),
        (("--rows", "2"), "--rows goes with --levels"),
        (("--samples", "2"), "go with --code"),
        (("--harness", "x", "--split", "test"), "--split goes with losses"),
        (("--split", "dev"), "'validation', 'test'"),
    ],
)
def test_options_that_contradict_are_told(dylora: Run, run: Path, options: tuple[str, ...], told: str) -> None:
    outcome = dylora("evaluate", run, *options)
    assert outcome.code == 2 and told in outcome.err and not (run / "eval").exists()
