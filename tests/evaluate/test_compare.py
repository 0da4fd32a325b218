"""Two runs on the same rows."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import settings

from dylora_moe.config import make_config
from dylora_moe.errors import DataError
from dylora_moe.evaluate import compare
from dylora_moe.evaluate.compare import compare_rows, compare_runs
from dylora_moe.evaluate.load import Speaker
from dylora_moe.evaluate.run import evaluate_run, is_measured, read_rows
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train


def silent(line: str) -> None:
    pass


def rows(domain: str, losses: list[float], *, tokens: int = 10, size: int = 40) -> list[dict[str, Any]]:
    return [
        {"domain": domain, "row": f"{domain}-{place}", "nll": loss, "tokens": tokens, "right": 1, "bytes": size}
        for place, loss in enumerate(losses)
    ]


def test_rows_are_paired_by_their_text_and_not_by_their_place() -> None:
    ours, theirs = rows("d", [1.0, 2.0, 3.0]), rows("d", [1.5, 2.5, 3.5])
    (found,) = compare_rows(ours, theirs[::-1])
    assert found["difference"] == pytest.approx(-0.05) and found["interval"] == pytest.approx((-0.05, -0.05))
    assert (found["ours"], found["theirs"], found["unit"]) == (pytest.approx(0.2), pytest.approx(0.25), "nats a token")


def test_only_rows_and_domains_of_both_count() -> None:
    ours = rows("d", [1.0, 2.0, 50.0]) + rows("mine", [1.0])
    (found,) = compare_rows(ours, rows("d", [1.0, 2.0]) + rows("yours", [1.0]))
    assert (found["domain"], found["rows"], found["difference"]) == ("d", 2, 0.0)
    assert compare_rows(ours, rows("yours", [1.0])) == []


def test_models_that_count_tokens_differently_are_compared_by_bytes() -> None:
    (found,) = compare_rows(rows("d", [1.0, 3.0], tokens=10), rows("d", [2.0, 4.0], tokens=13))
    assert found["unit"] == "bits a byte"
    assert found["ours"] == pytest.approx(4 / math.log(2) / 80)
    assert found["difference"] == pytest.approx(-2 / math.log(2) / 80)


def test_p_is_corrected_for_the_number_of_domains() -> None:
    ours = [row for domain in "abcd" for row in rows(domain, [1.0 + place / 9 for place in range(8)])]
    theirs = [row | {"nll": row["nll"] + (1.0 if row["domain"] == "a" else 0.0)} for row in ours]
    found = {each["domain"]: each for each in compare_rows(ours, theirs)}
    assert found["a"]["p_holm"] == pytest.approx(4 * found["a"]["p"]) and found["a"]["p"] < 0.02
    assert found["b"]["p"] == found["b"]["p_holm"] == 1.0


def test_a_run_is_compared_with_others(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, same = (Path(shutil.copytree(finished_run, tmp_path / name)) for name in ("run", "same"))
    found = compare_runs(run, [same], split="validation", tell=silent)
    assert [each["difference"] for each in found["others"][0]["domains"]] == [0.0] * 3
    assert RunDir(run).read("eval/compare.json")["others"][0]["run"] == str(same)
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
