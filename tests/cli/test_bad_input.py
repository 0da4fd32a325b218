"""Whatever is wrong with the input is told in one message before training, and nothing is written over."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import write_base, write_lines

Run = Callable[..., Any]


def files(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def refused(dylora: Run, recipe: Run, tmp_path: Path) -> Run:
    """(*flags, **changes) -> the one message of a training that was refused and left no file."""

    def attempt(*flags: object, **changes: Any) -> str:
        outcome = dylora("train", recipe(**changes), *flags)
        assert outcome.code == 1, outcome.out
        assert outcome.err.startswith("Error: ") and outcome.err.count("Error: ") == 1
        assert "Traceback" not in outcome.err and "Training for" not in outcome.out
        assert files(tmp_path / "runs") == {}
        return outcome.err

    return attempt


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., list[dict[str, str]]]:
    """(rows or text) -> `datasets` with one file of them."""

    def write(content: Any) -> list[dict[str, str]]:
        path = tmp_path / "mine.jsonl"
        path.write_text(content) if isinstance(content, str) else write_lines(path, content)
        return [{"path": str(path)}]

    return write


def test_an_empty_file(refused: Run, rows: Run) -> None:
    text = refused(datasets=rows(""))
    assert "mine.jsonl" in text and "at least one row" in text


def test_a_row_without_an_answer(refused: Run, rows: Run) -> None:
    good = [{"prompt": f"p{index}", "completion": "c"} for index in range(5)]
    text = refused(datasets=rows([*good, {"prompt": "p"}, {"prompt": "q", "completion": "  "}]))
    assert "mine.jsonl" in text and "2 of 7" in text and "line 6" in text and "'completion'" in text


def test_rows_of_no_known_format(refused: Run, rows: Run) -> None:
    text = refused(datasets=rows([{"frage": "a", "antwort": "b"}]))
    assert "frage, antwort" in text and "alpaca (instruction, input, output|response)" in text


def test_a_format_that_does_not_exist(refused: Run, tiny_rows: dict[str, Path]) -> None:
    text = refused(datasets=[{"path": str(tiny_rows["sums"]), "format": "alpacca"}])
    assert "format must be one of" in text and "Did you mean 'alpaca'?" in text


def test_a_data_set_that_does_not_exist(refused: Run) -> None:
    text = refused(datasets=["flaks"])
    assert "'flaks'" in text and "Did you mean 'flask'?" in text


def test_a_typo_in_the_data_is_told_before_the_base_is_fetched(refused: Run) -> None:
    assert "'flaks'" in refused(datasets=["flaks"], base_model="/nowhere")


def test_rows_longer_than_allowed(refused: Run) -> None:
    text = refused(max_length=30)
    assert "max_length=30" in text and "overlong: drop" in text


def test_a_tokenizer_without_an_end_token(refused: Run, tmp_path: Path) -> None:
    text = refused(base_model=str(write_base(tmp_path / "endless", eos_token=None)))
    assert "must have an end token" in text and "eos_token" in text


def test_a_base_that_does_not_exist(refused: Run, tmp_path: Path) -> None:
    assert "nowhere" in refused(base_model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num_experts", 0], ["num_experts", "of at least 1", "got 0"]),
        (["--num_experts", -3], ["num_experts", "got -3"]),
        (["--top_k", 9], ["top_k must be between 1 and num_experts=3, got 9"]),
        (["--num_experts", 4, "--lora-r", 12], ["lora_r must be a multiple of 8 with 4 experts", "got 12", "Take 16"]),
        (["--learning_rate", "nan"], ["learning_rate", "nan"]),
        (["--seed", 2**32], ["seed", str(2**32)]),
        (["--run_name", "../elsewhere"], ["run_name", "../elsewhere"]),
        (["--tap_layer", 7], ["tap_layer must be below the 2 layers", "got 7"]),
        (["--datasets", ""], ["datasets"]),
        (["--fp16", "--bf16"], ["fp16 and bf16 exclude each other"]),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work(refused: Run, flags: list[object], told: list[str]) -> None:
    text = refused(*flags)
    assert all(part in text for part in told), text


@pytest.mark.parametrize("targets", ["z_proj", "q_proj,z_proj", ""])
def test_a_target_module_that_matches_nothing(refused: Run, targets: str) -> None:
    text = refused("--target-modules", targets)
    assert "target_modules must name Linears of this base" in text
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in text and "all-linear" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_without_a_gpu(refused: Run) -> None:
    assert "fp16 needs a GPU" in refused("--fp16", bf16=...)


def test_a_file_in_the_place_of_the_folder(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "must be a folder that can be written" in refused("--output_dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_setting(refused: Run) -> None:
    text = refused(nm_experts=3)
    assert "recipe.yaml:" in text and "Did you mean num_experts?" in text


def test_a_refused_attempt_does_not_stand_in_the_way_of_the_next(dylora: Run, refused: Run, recipe: Run) -> None:
    refused("--target-modules", "z_proj")
    outcome = dylora("train", recipe())
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("flags", [["--num_experts", "0"], ["--tap_layer", "9"], ["--base_model", "/nowhere"]], ids=str)
def test_a_finished_run_survives_it(dylora: Run, finished: Any, tmp_path: Path, flags: list[str]) -> None:
    runs = Path(shutil.copytree(finished.folder.parent, tmp_path / "runs"))
    before = files(runs)
    outcome = dylora(*finished.arguments, "--output_dir", runs, *flags)
    assert outcome.code == 1 and outcome.err.startswith("Error: ") and files(runs) == before
