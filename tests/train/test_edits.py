"""Experts of a stream changed by hand: what the change does, that it is a stage like others, and what is refused."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tests.tiny import domain_rows, write_lines
from tests.train.streams import Stop, beside, outcome, stop_at

from dylora_moe.config import RunConfig
from dylora_moe.errors import DataError, RunError, TunerError
from dylora_moe.run_dir import RunDir
from dylora_moe.skills.library import load_library
from dylora_moe.train import edits, fitting
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.stream_result import rollback
from dylora_moe.tuner.folder import copy_expert


def merge(path: Path, into: str, *gone: str) -> dict[str, Any]:
    return edits.merge(path, into, gone, Stages(), StopSignals())


def remove(path: Path, expert: str, skills_to: str | None = None) -> dict[str, Any]:
    return edits.remove(path, expert, skills_to, Stages(), StopSignals())


def take_in(path: Path, adapter: Path, skill: str, *datasets: str) -> dict[str, Any]:
    return edits.take_in(path, adapter, skill, datasets, Stages(), StopSignals())


def served_by(result: dict[str, Any]) -> dict[str, str]:
    return dict(zip(result["summary"]["skills"], result["summary"]["routing"]["served_by"], strict=True))


@pytest.fixture
def finished(whole: Any, tmp_path: Path) -> Path:
    """The folder of a stream of three skills, to be changed."""
    shutil.copytree(whole[1].path, tmp_path / "finished")
    return tmp_path / "finished"


def test_merged_experts_serve_the_skills_of_both(finished: Path) -> None:
    before = outcome(RunDir(finished))
    result = merge(finished, "capitals", "functions")
    assert result["experts"] == ["capitals", "sums"]
    assert served_by(result) == {"capitals": "capitals", "functions": "capitals", "sums": "sums"}
    stage, matrix = result["stages"][-1], result["summary"]["loss"]["matrix"]
    assert (stage["name"], stage["skill"], stage["decision"]["kind"]) == ("04-merge", None, "merge")
    assert len(matrix) == 4 and all(len(row) == 3 for row in matrix)
    assert matrix[3][2] == matrix[2][2] and matrix[3][1] != matrix[2][1]  # sums are as they were
    assert result["summary"]["loss"]["backward_transfer"] != 0
    library = load_library(finished).skills
    assert [library[name].record.loss for name in result["summary"]["skills"]] == pytest.approx(matrix[3], abs=1e-6)
    one, other = (
        load_file(finished / f"{at}/experts/sums/adapter_model.safetensors") for at in ("final", "stages/03-sums/final")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rollback(finished, "04-merge")["skills"] == ["capitals", "functions", "sums"]
    after = outcome(RunDir(finished))
    results = [found.pop("result.json") for found in (before, after)]
    assert after == before and results[0].partition(b"stages")[2] == results[1].partition(b"stages")[2]


def test_a_stream_goes_on_after_a_change(whole: Any, tmp_path: Path) -> None:
    config = beside(whole, "changed", skills=whole[0].skills[:2])
    train(config)
    merge(config.run_dir, "functions", "capitals")
    result = train(beside(whole, "changed"))
    assert [stage["name"] for stage in result["stages"]] == ["capitals", "functions", "03-merge", "sums"]
    assert sorted(path.name for path in (config.run_dir / "stages").iterdir()) == [
        "01-capitals",
        "02-functions",
        "03-merge",
        "04-sums",
    ]
    assert result["experts"] == ["functions", "sums"] and train(beside(whole, "changed"))["already_finished"]
    assert served_by(result) == {"capitals": "functions", "functions": "functions", "sums": "sums"}


def test_an_expert_that_skills_need_is_not_removed(finished: Path) -> None:
    before = outcome(RunDir(finished))
    with pytest.raises(
        RunError, match=r"must serve no skill to be removed, and functions serves functions\. Give them"
    ):
        remove(finished, "functions")
    with pytest.raises(RunError, match="must serve no skill"):
        remove(finished, "functions", "functions")
    with pytest.raises(TunerError, match="there is no expert 'nobody'; there are capitals, functions, sums"):
        remove(finished, "functions", "nobody")
    assert outcome(RunDir(finished)) == before


def test_the_skills_of_a_removed_expert_go_to_another(finished: Path) -> None:
    result = remove(finished, "functions", "sums")
    assert result["experts"] == ["capitals", "sums"]
    assert served_by(result) == {"capitals": "capitals", "functions": "sums", "sums": "sums"}
    assert result["summary"]["routing"]["accuracy"] == 1.0
    matrix = result["summary"]["loss"]["matrix"]
    assert matrix[3][0] == matrix[2][0] and matrix[3][1] > matrix[2][1] and matrix[3][2] == matrix[2][2]


def test_experts_go_until_one_is_left(finished: Path) -> None:
    remove(finished, "functions", "sums")
    result = remove(finished, "capitals", "sums")
    assert result["experts"] == ["sums"] and set(served_by(result).values()) == {"sums"}
    with pytest.raises(TunerError, match="needs two different experts or more"):
        merge(finished, "sums")


@pytest.fixture
def adapter(whole: Any, tmp_path: Path) -> Path:
    """The expert for sums as a plain PEFT LoRA."""
    copy_expert(whole[1] / "final", "sums", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_lora_is_taken_in_as_if_it_had_been_trained_here(
    whole: Any, adapter: Path, tiny_rows: dict[str, Path], by_hand: bool
) -> None:
    """By hand, or by the recipe."""
    entry = {"skill": "sums", "datasets": [str(tiny_rows["sums"])], "adapter": str(adapter)}
    name = f"taken-{by_hand}"
    if by_hand:
        config = beside(whole, name, skills=whole[0].skills[:2])
        train(config)
        result = take_in(config.run_dir, adapter, "sums", str(tiny_rows["sums"]))
        assert train(config)["already_finished"]
    else:
        config = beside(whole, name, skills=(*whole[0].skills[:2], entry))
        result = train(config)
    stage = result["stages"][-1]
    assert stage["decision"]["kind"] == "import" and "It comes with its expert." in stage["decision"]["reason"]
    trained = whole[2]["stages"][-1]
    assert stage["figures"]["losses"] == trained["figures"]["losses"]
    assert stage["figures"]["routed"] == trained["figures"]["routed"]
    files = [
        path / "final" / "experts" / "sums" / "adapter_model.safetensors" for path in (config.run_dir, whole[1].path)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_stream_may_begin_with_a_lora(
    stream: Callable[..., RunConfig], adapter: Path, tiny_rows: dict[str, Path]
) -> None:
    skills = [
        {"skill": "sums", "datasets": [str(tiny_rows["sums"])], "adapter": str(adapter)},
        str(tiny_rows["capitals"]),
    ]
    config = stream(skills=skills)
    result = train(config)
    assert [stage["decision"]["kind"] for stage in result["stages"]] == ["import", "grow"]
    assert result["experts"] == ["sums", "capitals"] and result["summary"]["routing"]["accuracy"] == 1.0
    taken = load_file(config.run_dir / "final" / "experts" / "sums" / "adapter_model.safetensors")
    given = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(taken[name], given[name]) for name in given)


def test_what_cannot_be_taken_in_changes_nothing(
    finished: Path, adapter: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    before = outcome(RunDir(finished))
    few = write_lines(tmp_path / "few.jsonl", domain_rows("sums")[:2])
    more = write_lines(tmp_path / "more.jsonl", domain_rows("sums")[:24])
    with pytest.raises(DataError, match="skills must have different names, got 'sums' twice"):
        take_in(finished, adapter, "sums", str(more))
    with pytest.raises(DataError, match="at least 2 training rows"):
        take_in(finished, adapter, "few", str(few))
    with pytest.raises(TunerError, match="holds no adapter_config"):
        take_in(finished, tmp_path / "nothing", "more", str(more))
    assert outcome(RunDir(finished)) == before
    (adapter / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(TunerError, match="cannot be read"):
        take_in(finished, adapter, "more", str(more))
    assert outcome(RunDir(finished)) == before


def test_a_bad_lora_is_refused_before_any_work(
    stream: Callable[..., RunConfig], adapter: Path, tiny_rows: dict[str, Path]
) -> None:
    """Even where it is the last skill's; and where it is sound, it is needed once."""
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    entry = {"skill": "sums", "datasets": [str(tiny_rows["sums"])], "adapter": str(adapter)}
    config = stream(skills=[str(tiny_rows["capitals"]), entry])
    (adapter / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(TunerError, match="cannot be read"):
        train(config)
    assert not (config.run_dir / "stages").exists()
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    train(config)
    shutil.rmtree(adapter)
    more = config.model_copy(update={"skills": (*config.skills, str(tiny_rows["functions"]))})
    assert len(train(more)["stages"]) == 3
    gone = {**entry, "skill": "again"}
    with pytest.raises(TunerError, match="holds no adapter_config"):
        train(config.model_copy(update={"skills": (*more.skills, gone)}))


def test_the_base_that_a_lora_names_is_told(
    stream: Callable[..., RunConfig], adapter: Path, tiny_rows: dict[str, Path]
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "another/base"}))
    told = io.StringIO()
    entry = {"skill": "sums", "datasets": [str(tiny_rows["sums"])], "adapter": str(adapter)}
    train(stream(skills=[entry]), Stages(console=Console(file=told, width=1000)))
    assert "says that it is of another/base, and the base is" in told.getvalue()


def test_few_rows_are_enough_for_a_skill_with_its_expert(finished: Path, adapter: Path, tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", domain_rows("sums")[:12])
    assert take_in(finished, adapter, "few", str(few))["stages"][-1]["decision"]["kind"] == "import"


def test_no_other_experts_are_merged_for_one_that_comes(
    stream: Callable[..., RunConfig], adapter: Path, tiny_rows: dict[str, Path]
) -> None:
    config = stream(skills=stream().skills[:2], max_experts=2, at_max_experts="merge")
    train(config)
    assert len(take_in(config.run_dir, adapter, "sums", str(tiny_rows["sums"]))["experts"]) == 3


def test_what_a_stage_was_begun_as_is_what_it_ends_as(
    stream: Callable[..., RunConfig], adapter: Path, tiny_rows: dict[str, Path]
) -> None:
    plain, sums = str(tiny_rows["capitals"]), {"skill": "sums", "datasets": [str(tiny_rows["sums"])]}
    config = stream(skills=[plain, sums])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, fitting, "plan_memory", 2)
        train(config)
    for more in ({"adapter": str(adapter)}, {"decision": "extend"}):
        with pytest.raises(RunError, match="skill sums must be what its stage was begun as, decision None, and is"):
            train(config.model_copy(update={"skills": (plain, sums | more)}))
    assert [stage["decision"]["kind"] for stage in train(config)["stages"]] == ["grow", "grow"]


def test_one_changes_a_stream_at_a_time(finished: Path) -> None:
    with RunDir(finished).locked(), pytest.raises(RunError, match="another process"):
        merge(finished, "sums", "functions")


@pytest.mark.parametrize("place", ["measure_stage", "finish_stream"])
def test_a_change_that_was_stopped_is_made_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    shutil.copytree(finished, tmp_path / "other")
    expected = merge(tmp_path / "other", "sums", "functions")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, edits, place, 1)
        merge(finished, "sums", "functions")
    if place == "finish_stream":  # it counts already
        rollback(finished, "04-merge")
        shutil.rmtree(finished / "undone")
    assert merge(finished, "sums", "functions")["summary"] == expected["summary"]


def test_only_a_stream_that_has_come_to_its_end_is_changed(whole: Any, tmp_path: Path, finished: Path) -> None:
    result = (finished / "result.json").read_bytes()
    (finished / "result.json").unlink()
    with pytest.raises(RunError, match="its result is still to come"):
        merge(finished, "sums", "functions")
    (finished / "result.json").write_bytes(result)
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    settings["skills"].append("flask")
    (finished / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(RunError, match=r"flask is still to come\. Train it first"):
        merge(finished, "sums", "functions")
    with pytest.raises(RunError, match=r"holds no config\.yaml"):
        merge(tmp_path / "nothing", "sums", "functions")
