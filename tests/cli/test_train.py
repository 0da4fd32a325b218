"""`dylora train`, from the recipe to the next commands to try."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., Any]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_json_is_the_result_and_all_there_is_on_standard_output(finished: Any) -> None:
    assert finished.outcome.json() == finished.result
    assert finished.result["steps"] == 5 and finished.result["after"]["mean_loss"] > 0


def test_people_read_the_tables_beside_it(finished: Any) -> None:
    text = finished.outcome.err
    for shown in ("Data", "Parameters", "expert_2", "Validation loss", "capitals", "dead experts", "Next:"):
        assert shown in text
    assert "Traceback" not in text and "Warning" not in text
    assert "step     2/5  loss" in text and "step     5  validation loss:" in text


def test_flags_change_single_settings_of_the_recipe(finished: Any) -> None:
    config = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert (config["max_steps"], config["lora_alpha"], config["batch_size"]) == (5, 16.0, 6)
    adapter = json.loads((finished.folder / "final" / "experts" / "expert_0" / "adapter_config.json").read_text())
    assert (adapter["lora_alpha"], adapter["r"]) == (16, 8)


def test_a_run_is_named_after_its_recipe(finished: Any) -> None:
    assert finished.folder.name == "three-domains" and (finished.folder / "result.json").is_file()


def test_the_same_command_again_trains_nothing_and_says_so(dylora: Run, finished: Any) -> None:
    before = hashes(finished.folder)
    outcome = dylora(*finished.arguments, "--json")
    assert outcome.json() == {**finished.result, "already_finished": True}
    assert "finished already; nothing was trained" in outcome.err and "Validation loss" in outcome.err
    assert hashes(finished.folder) == before


def test_other_settings_on_a_finished_run_are_refused(dylora: Run, finished: Any) -> None:
    before = hashes(finished.folder)
    outcome = dylora(*finished.arguments, "--top_k", "2")
    assert outcome.code == 1 and "top_k 1 there, 2 here" in outcome.err and "lora_alpha" not in outcome.err
    assert hashes(finished.folder) == before


def test_a_run_that_did_not_finish_is_left_alone_or_finished(dylora: Run, finished: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished.folder, runs / "three-domains")
    (runs / "three-domains" / "result.json").unlink()
    before = hashes(runs)
    outcome = dylora(*finished.arguments, "--output-dir", runs, "--resume", "never")
    assert outcome.code == 1 and "did not finish" in outcome.err and hashes(runs) == before
    outcome = dylora(*finished.arguments, "--output-dir", runs)
    assert outcome.code == 0 and "Going on from step-0" in outcome.out + outcome.err
    result = [json.loads((folder / "result.json").read_text()) for folder in (finished.folder, runs / "three-domains")]
    assert result[0]["after"] == result[1]["after"] and result[0]["samples"] == result[1]["samples"]


def test_a_folder_in_use_is_left_alone(dylora: Run, recipe: Run, hold: Run, tmp_path: Path) -> None:
    hold(tmp_path / "runs" / "tiny")
    outcome = dylora("train", recipe())
    assert outcome.code == 1 and "in use by another process" in outcome.err
    assert set(hashes(tmp_path / "runs")) == {"tiny/.lock.json"}


def test_the_commands_it_ends_with_work(dylora: Run, finished: Any, monkeypatch: Any, tmp_path: Path) -> None:
    lines = finished.outcome.err.split("Next:\n")[1].splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  dylora ")]
    assert [words[1] for words in commands] == ["report", "chat", "evaluate", "experts", "experts"]
    copy = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    monkeypatch.chdir(tmp_path)
    for words in commands:
        assert str(finished.folder) in words
        outcome = dylora(*(str(copy) if word == str(finished.folder) else word for word in words[1:]))
        assert outcome.code == 0, outcome.err


def test_without_json_all_output_is_for_people(dylora: Run, recipe: Run) -> None:
    outcome = dylora("train", recipe(sample_tokens=4))
    assert outcome.code == 0 and outcome.err == ""
    assert "Parameters" in outcome.out and "before training:" in outcome.out and "dylora evaluate" in outcome.out


def test_names_are_shown_as_they_are(dylora: Run, recipe: Run, tiny_rows: dict[str, Path]) -> None:
    datasets = [{"path": str(tiny_rows["sums"]), "domain": "sums [/x]"}]
    outcome = dylora("train", recipe(datasets=datasets, sample_tokens=2))
    assert outcome.code == 0 and outcome.out.count("sums [/x]") >= 4


def test_no_recipe_is_needed(dylora: Run, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> None:
    paths = ",".join(str(tiny_rows[domain]) for domain in ("sums", "capitals"))
    flags = ["--base-model", tiny_base, "--datasets", paths, "--output_dir", tmp_path, "--num-experts", 1]
    outcome = dylora("train", *flags, "--max_steps=1", "--no-bf16", "--sample-tokens=0", "--lora_r=4", "--json")
    result = outcome.json()
    assert [each["domain"] for each in result["before"]["domains"]] == ["sums", "capitals"]
    assert result["after"]["routing"] is None and result["samples"] == []
    assert "Which expert serves" not in outcome.err
    assert json.loads((tmp_path / "run" / "final" / "dylora_moe.json").read_text())["experts"][0]["name"] == "expert_0"


@pytest.mark.parametrize("name", ["requests", "stripe", "flask"])
def test_the_built_in_skill_sets_train(dylora: Run, recipe: Run, name: str) -> None:
    datasets = [{"name": name, "num_examples": 8}]
    outcome = dylora("train", recipe(datasets=datasets, max_length=4096, batch_size=2, num_experts=1), "--json")
    assert outcome.json()["before"]["domains"][0]["domain"] == name


def test_a_dry_run_says_what_the_run_will_need_and_keeps_nothing(dylora: Run, recipe: Run, tmp_path: Path) -> None:
    outcome = dylora("train", recipe(), "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["counts"]["steps"] > 0 and found["run_s"] > 0 and found["peak"] > 1e6
    assert found["plan"]["estimate"]["peak"] == pytest.approx(found["peak"], rel=0.5)
    assert "time of the run" in outcome.err and not (tmp_path / "runs").exists()
