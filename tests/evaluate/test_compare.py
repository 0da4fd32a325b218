"""Two runs on the same rows."""

import json
import shutil
from pathlib import Path

import pytest
from tests.tiny import settings

from dylora_moe.config import make_config
from dylora_moe.errors import DataError
from dylora_moe.evaluate import compare
from dylora_moe.evaluate.compare import compare_runs
from dylora_moe.evaluate.load import Speaker
from dylora_moe.evaluate.run import evaluate_run, is_measured, read_rows
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train


def silent(line: str) -> None:
    pass


def test_a_run_is_compared_with_others(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, same = (Path(shutil.copytree(finished_run, tmp_path / name)) for name in ("run", "same"))
    found = compare_runs(run, [same], split="validation", tell=silent)
    assert [each["difference"] for each in found["others"][0]["domains"]] == [0.0] * 3
    assert RunDir(run).read("eval/compare.json") == json.loads(json.dumps(found))
    assert found["others"][0]["run"] == str(same)
    assert found["others"][0]["model"] == found["model"] == RunDir(run).model_digest()
    monkeypatch.setattr(compare, "evaluate_run", None)  # what is measured is not measured again
    assert compare_runs(run, [same], split="validation", tell=silent) == found


def test_figures_of_another_model_in_the_folder_are_not_believed(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    assert not is_measured(RunDir(run), Speaker(), "validation")
    evaluate_run(run, [Speaker()], tell=silent)
    assert is_measured(RunDir(run), Speaker(), "validation")
    assert not is_measured(RunDir(run), Speaker(kind="base"), "validation")
    assert read_rows(RunDir(run), Speaker(kind="base"), "validation") == []
    kept = (run / "eval" / "rows" / "routed.jsonl").read_text()
    (run / "eval" / "rows" / "routed.jsonl").write_text(kept.splitlines(keepends=True)[0])
    assert not is_measured(RunDir(run), Speaker(), "validation"), "rows were lost"
    (run / "eval" / "rows" / "routed.jsonl").write_text(kept)
    assert is_measured(RunDir(run), Speaker(), "validation")
    router = run / "final" / "router.safetensors"
    router.write_bytes(router.read_bytes()[:-1] + b"\x7f")
    assert not is_measured(RunDir(run), Speaker(), "validation")


def test_rows_of_which_another_part_is_foretold_are_not_the_same(
    finished_run: Path, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    changes = {"learn": "all", "max_steps": 1, "sample_tokens": 0}
    config = make_config(settings(tiny_base, tiny_rows, tmp_path / "runs") | changes)
    train(config)
    other = config.run_dir
    with pytest.raises(DataError, match="have none in common"):
        compare_runs(run, [other], split="validation", tell=silent)
