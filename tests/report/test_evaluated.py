"""The page of a run that was really measured, with what `dylora evaluate` leaves there."""

import json
import shutil
from pathlib import Path

import pytest
from tests.report.pages import page_of

from dylora_moe.errors import SandboxError
from dylora_moe.evaluate import answers, code
from dylora_moe.evaluate.compare import compare_runs
from dylora_moe.evaluate.run import evaluate_experts, evaluate_run
from dylora_moe.sandbox import find_sandbox


def silent(line: str) -> None:
    pass


def test_all_that_evaluation_writes_is_told(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, single = (Path(shutil.copytree(trained[name], tmp_path / name)) for name in ("joint", "single"))
    matrix = evaluate_experts(run, tell=silent)["matrix"]
    compared = compare_runs(run, [single], split="validation", tell=silent)
    told = answers.evaluate_answers(run, rows=2, tell=silent)
    page = page_of(run)
    assert "Not shown" not in page.text
    for row in matrix["rows"]:
        assert page.row(row["speaker"])[1:4] == [f"{loss:.3f}" for loss in row["losses"]]
    for domain in compared["others"][0]["domains"]:
        row = page.row(domain["domain"], f"{domain['ours']:.3f}", f"{domain['theirs']:.3f}")
        assert row[-1] == str(domain["rows"])
    assert f"Against {single}" in page.text and "Right answers, validation rows" in page.text
    assert page.row(told["domains"][0]["domain"], "the same words")[-1] == "2"
    assert "Which tokens go where" in page.text and "How alike the experts' updates are" in page.text
    assert "Load that moved since the evaluation before" in page.text


def test_figures_of_another_model_are_not_shown(trained: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained["joint"], tmp_path / "joint"))
    evaluate_run(run, tell=silent)
    page = page_of(run)
    assert "95 % bootstrap interval" in page.text and "another model" not in page.text
    router = run / "final" / "router.safetensors"
    router.write_bytes(router.read_bytes()[:-1] + b"\x7f")
    page = page_of(run)
    assert "base, routed in the folder eval were measured of another model than the run has now" in page.text
    assert "95 % bootstrap interval" not in page.text and "Losses" in page.text


def test_problems_solved_are_told(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        find_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    run = Path(shutil.copytree(trained["joint"], tmp_path / "joint"))
    task = {"task_id": 11, "text": "Return 1.", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(task))
    monkeypatch.setattr(code, "_MAX_TOKENS", 6)
    found = code.evaluate_code(run, tmp_path / "mbpp.jsonl", tell=silent)
    page = page_of(run)
    assert "Not shown" not in page.text and f"programs ran in: {found['sandbox']}" in page.text
    assert page.row("routed", "0.0%") and "Code: mbpp" in page.text
