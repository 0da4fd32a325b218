"""Streams of skills: what is decided, what stays as it was, and that a stream goes on wherever it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import DOMAINS, domain_rows, write_lines
from tests.train.whole import CLOCKS

from dylora_moe.bases import load_base
from dylora_moe.config import RunConfig, make_config
from dylora_moe.errors import ConfigError, DataError, RunError
from dylora_moe.evaluate.run import evaluate_run
from dylora_moe.run_dir import RunDir
from dylora_moe.train import continual, fitting
from dylora_moe.train.run import train
from dylora_moe.train.stream import number_of
from dylora_moe.train.stream_result import rollback
from dylora_moe.tuner import load_model

Settings = Callable[..., dict[str, Any]]


class Stop(Exception):
    """Stands for a stop at a place of the test's choice."""


@pytest.fixture
def stream(tiny_settings: Settings, tiny_rows: dict[str, Path]) -> Callable[..., RunConfig]:
    """(**changes) -> a stream of the tiny domains, three steps each."""

    def make(**changes: Any) -> RunConfig:
        values = tiny_settings(mode="continual", skills=[str(tiny_rows[domain]) for domain in DOMAINS])
        values |= {"validation_split": 0.1, "max_steps": 3, "save_steps": 1, "feature_rows": 20, "sample_tokens": 0}
        return make_config({key: value for key, value in values.items() if key != "datasets"} | changes)

    return make


def outcome(run: RunDir) -> dict[str, Any]:
    """All that a stream leaves, but for clocks, paths, checkpoints and what was undone."""
    left: dict[str, Any] = {}
    for path in sorted(run.path.rglob("*")):
        name = path.relative_to(run.path).as_posix()
        if not path.is_file() or {"checkpoints", "undone", "eval"} & set(name.split("/")):
            continue
        if path.name in ("environment.json", "config.yaml", "report.html") or path.name.startswith(".lock"):
            continue
        content = path.read_bytes().replace(str(run.path).encode(), b"RUN")
        if path.name == "metrics.jsonl":
            lines = RunDir(path.parent).read_lines(path.name)
            left[name] = [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]
        else:
            left[name] = content
    return left


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_rows: dict[str, Path]) -> Any:
    """(settings, run folder, result) of a stream without a stop; not to be changed."""
    from tests.tiny import settings

    values = settings(tiny_base, tiny_rows, tmp_path_factory.mktemp("streams"))
    values |= {"mode": "continual", "skills": [str(tiny_rows[domain]) for domain in DOMAINS], "run_name": "whole"}
    values |= {"validation_split": 0.1, "max_steps": 3, "save_steps": 1, "feature_rows": 20, "sample_tokens": 0}
    config = make_config({key: value for key, value in values.items() if key != "datasets"})
    result = json.loads(json.dumps(train(config), allow_nan=False))
    return config, RunDir(config.run_dir), result


def beside(whole: Any, name: str, **changes: Any) -> RunConfig:
    return whole[0].model_copy(update={"run_name": name, **changes})


def test_new_skills_get_experts_and_old_ones_stay_as_they_are(whole: Any) -> None:
    _, run, result = whole
    assert [stage["decision"]["kind"] for stage in result["stages"]] == ["grow"] * 3
    assert result["experts"] == list(DOMAINS)
    stages = sorted((run / "stages").iterdir())
    assert [stage.name for stage in stages] == ["01-capitals", "02-functions", "03-sums"]
    for earlier, later in pairwise(stages):
        for file in (earlier / "final" / "experts").rglob("*"):
            if file.is_file():
                assert (
                    file.read_bytes()
                    == (later / "final" / "experts" / file.relative_to(earlier / "final" / "experts")).read_bytes()
                )
    assert (run / "final" / "experts" / "sums").is_dir() and "<html" in (run / "report.html").read_text()


def test_what_is_learned_is_neither_forgotten_nor_misrouted(whole: Any) -> None:
    result = whole[2]
    matrix = result["summary"]["loss"]["matrix"]
    for column in range(3):
        assert len({row[column] for row in matrix[column:]}) == 1
        assert matrix[column][column] < result["stages"][column]["base_loss"]
    assert result["summary"]["loss"]["backward_transfer"] == result["summary"]["loss"]["forgetting"] == 0.0
    assert result["summary"]["routing"]["accuracy"] == 1.0
    assert evaluate_run(whole[1].path, progress=lambda text: None).mean_loss == pytest.approx(
        result["summary"]["loss"]["average"], abs=1e-6
    )


def test_growth_leaves_the_logits_of_old_skills_as_they_are(whole: Any, tiny_base: Path) -> None:
    found = []
    for stage in ("02-functions", "03-sums"):
        base = load_base(str(tiny_base), dtype=torch.float32)
        model = load_model(base.model, whole[1] / "stages" / stage / "final")
        texts = [row["prompt"] for domain in ("capitals", "functions") for row in domain_rows(domain)[:4]]
        batch = base.tokenizer(texts, return_tensors="pt", padding=True)
        prompt = batch["attention_mask"].bool()
        with torch.no_grad():
            found.append(
                model(prompt_mask=prompt, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            )
            (decision,) = model.decisions.values()
        assert decision.experts is not None and decision.experts.flatten().tolist() == [0] * 4 + [1] * 4
    assert torch.equal(*found)


def test_a_finished_stream_is_left_alone(whole: Any) -> None:
    before = outcome(whole[1])
    result = train(whole[0])
    assert result["already_finished"] and outcome(whole[1]) == before


# In the order in which a stream comes by; the call of each after the last stop at which to stop.
PLACES = (
    (continual, "build_run_data", 3),
    (continual, "read_features", 1),
    (continual, "examine", 1),
    (continual, "fit_prototypes", 1),
    (fitting, "plan_memory", 1),
    (fitting, "calibrate_router", 1),
    (fitting, "save_model", 1),
    (continual, "measure_stage", 1),
    (continual, "save_library", 1),
    (continual, "read_features", 2),
    (continual, "examine", 1),
    (continual, "fit_prototypes", 1),
    (fitting, "plan_memory", 1),
    (fitting, "calibrate_router", 1),
    (fitting, "save_model", 1),
    (continual, "measure_stage", 1),
    (continual, "share_files", 1),
    (continual, "save_library", 1),
    (continual, "measure_stage", 2),
    (continual, "finish_stream", 1),
)


def test_a_stream_that_stopped_anywhere_ends_the_same(whole: Any) -> None:
    """One stop after the other, each at another place and later than the one before."""
    config = beside(whole, "stopped")
    for owner, name, times in PLACES:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, owner, name, times)
            train(config)
    train(config)
    assert outcome(RunDir(config.run_dir)) == outcome(whole[1])


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, times: int) -> None:
    act, calls = getattr(owner, name), []

    def acting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == times:
            raise Stop
        return act(*args, **kwargs)

    patch.setattr(owner, name, acting)


def test_a_killed_stream_ends_the_same(whole: Any) -> None:
    """By SIGKILL in the second skill's training, between its steps."""
    config = beside(whole, "killed")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from dylora_moe.config import make_config\n"
        "from dylora_moe.train.run import train\n"
        "import json\n"
        "train(make_config(json.loads(sys.argv[1])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, config.model_dump_json()], env=environment)
    while process.poll() is None and not list(config.run_dir.glob("stages/02-*/checkpoints/step-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (config.run_dir / "stages" / "02-functions" / "stage.json").exists()
    train(config)
    assert outcome(RunDir(config.run_dir)) == outcome(whole[1])


def test_a_skill_that_comes_later_is_learned_by_the_same_command(whole: Any) -> None:
    config = beside(whole, "grown", skills=whole[0].skills[:2])
    assert len(train(config)["stages"]) == 2
    train(beside(whole, "grown"))
    assert outcome(RunDir(config.run_dir)) == outcome(whole[1])


def test_a_stream_is_taken_back_and_learns_again(whole: Any) -> None:
    config = beside(whole, "back")
    train(config)
    undone = rollback(config.run_dir, "functions")
    assert undone["skills"] == ["capitals"] and undone["undone"] == ["02-functions", "03-sums"]
    run = RunDir(config.run_dir)
    assert run.read("result.json")["experts"] == ["capitals"]
    assert sorted(path.name for path in (run / "final" / "experts").iterdir()) == ["capitals"]
    assert (run / "undone" / "1" / "03-sums" / "stage.json").is_file()
    with pytest.raises(RunError, match=r"one that .* has learned \(capitals\), got 'sums'"):
        rollback(config.run_dir, "sums")
    train(config)
    assert outcome(run) == outcome(whole[1])


def test_the_same_rows_again_are_reused(stream: Callable[..., RunConfig], tiny_rows: dict[str, Path]) -> None:
    again = {"skill": "shouting", "datasets": [str(tiny_rows["capitals"])]}
    result = train(stream(skills=[str(tiny_rows["capitals"]), again]))
    first, second = result["stages"]
    assert second["decision"]["kind"] == "reuse" and second["decision"]["expert"] == "capitals"
    assert second["decision"]["reason"] == "Its rows are those of capitals, which is learned already."
    assert result["experts"] == ["capitals"]
    assert second["figures"]["losses"]["shouting"] == first["figures"]["losses"]["capitals"]


@pytest.mark.parametrize("changes", [{"allow_expert_growth": False}, {"max_experts": 1}])
def test_without_room_the_nearest_expert_is_trained_further(
    stream: Callable[..., RunConfig], tiny_rows: dict[str, Path], changes: dict[str, Any]
) -> None:
    config = stream(skills=[str(tiny_rows["capitals"]), str(tiny_rows["sums"])], **changes)
    result = train(config)
    assert [stage["decision"]["kind"] for stage in result["stages"]] == ["grow", "extend"]
    assert result["experts"] == ["capitals"] and "But " in result["stages"][1]["decision"]["reason"]
    weights = [
        load_file(config.run_dir / "stages" / stage / "final/experts/capitals/adapter_model.safetensors")
        for stage in ("01-capitals", "02-sums")
    ]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_expert_may_have_another_rank(stream: Callable[..., RunConfig], tiny_rows: dict[str, Path]) -> None:
    wide = {"skill": "sums", "datasets": [str(tiny_rows["sums"])], "lora_r": 16}
    config = stream(skills=[str(tiny_rows["capitals"]), wide])
    train(config)
    ranks = [
        json.loads((config.run_dir / "final" / "experts" / name / "adapter_config.json").read_text())
        for name in ("capitals", "sums")
    ]
    assert [rank["r"] for rank in ranks] == [8, 16] and ranks[1]["lora_alpha"] == 2 * ranks[0]["lora_alpha"]


def test_too_few_rows_are_refused_before_any_work(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", domain_rows("sums")[:12])
    config = stream(skills=[str(few)])
    with pytest.raises(DataError, match=r"skill few must have at least 20 training rows .* got 1."):
        train(config)
    assert not (config.run_dir / "stages").exists()


def test_other_skills_in_learned_places_are_refused(whole: Any) -> None:
    before = outcome(whole[1])
    swapped = (whole[0].skills[1], whole[0].skills[0])
    with pytest.raises(RunError, match=r"skill 1 of the stream in .* was 'capitals', and is 'functions' now"):
        train(whole[0].model_copy(update={"skills": swapped}))
    with pytest.raises(RunError, match="other settings: learning_rate"):
        train(whole[0].model_copy(update={"learning_rate": 0.5}))
    assert outcome(whole[1]) == before


def test_a_library_of_another_base_is_refused(whole: Any, tmp_path: Path) -> None:
    config = beside(whole, "foreign", skills=whole[0].skills[:1])
    train(config)
    record = config.run_dir / "stages" / "01-capitals" / "skills.json"
    record.write_text(record.read_text().replace('"tap_layer": 0', '"tap_layer": 1'))
    with pytest.raises(RunError, match=r"layer 1, not of .*layer 0"):
        train(beside(whole, "foreign"))


def test_an_immature_expert_works_among_the_others(
    stream: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    compute = fitting.RoutedTrainer.compute_loss

    def looking(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        seen.append((any(d.experts is None for d in self.routed.decisions.values()), len(self.routed.decisions)))
        return loss

    monkeypatch.setattr(fitting.RoutedTrainer, "compute_loss", looking)
    result = train(stream(maturity_ratio=0.5, skills=stream().skills[:2]))
    assert seen == [(False, 0)] * 3 + [(True, 1), (True, 1), (False, 0)]
    assert result["summary"]["routing"]["accuracy"] == 1.0


def test_streams_refuse_what_they_cannot_do(stream: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="granularity must be sequence with mode: continual"):
        stream(granularity="token")


def test_two_experts_become_one_where_there_is_no_room(stream: Callable[..., RunConfig]) -> None:
    config = stream(max_experts=2, at_max_experts="merge")
    result = train(config)
    assert [stage["decision"]["kind"] for stage in result["stages"]] == ["grow"] * 3
    assert result["experts"] == ["capitals", "sums"]
    served_by = dict(zip(result["summary"]["skills"], result["summary"]["routing"]["served_by"], strict=True))
    assert served_by == {"capitals": "capitals", "functions": "capitals", "sums": "sums"}
    stages = sorted((config.run_dir / "stages").iterdir())
    merged = [load_file(stage / "final/experts/capitals/adapter_model.safetensors") for stage in stages[1:]]
    assert any(not torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_a_merge_survives_a_stop(stream: Callable[..., RunConfig]) -> None:
    whole = stream(max_experts=2, at_max_experts="merge", run_name="merged-whole")
    train(whole)
    config = whole.model_copy(update={"run_name": "merged-stopped"})
    for owner, name, times in (
        (fitting, "plan_memory", 3),
        (fitting, "save_model", 1),
        (continual, "measure_stage", 1),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, owner, name, times)
            train(config)
    train(config)
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(whole.run_dir))


def test_a_warm_start_begins_with_the_nearest_expert(
    stream: Callable[..., RunConfig], tiny_rows: dict[str, Path]
) -> None:
    skills = [str(tiny_rows["capitals"]), str(tiny_rows["sums"])]
    config = stream(warm_start=True, skills=skills, learning_rate=1e-12)
    train(config)
    one, other = (
        load_file(config.run_dir / "final/experts" / name / "adapter_model.safetensors")
        for name in ("capitals", "sums")
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


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
    assert len(evaluate_run(config.run_dir, progress=lambda text: None).domains) == 2


def test_a_stage_is_ended_with_the_rows_it_was_begun_with(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "sums.jsonl", domain_rows("sums"))
    config = stream(skills=[str(rows)])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, fitting, "plan_memory", 1)
        train(config)
    write_lines(rows, domain_rows("functions"))
    with pytest.raises(RunError, match="the data of skill sums must be those that its stage was begun with"):
        train(config)
    write_lines(rows, domain_rows("sums"))
    assert len(train(config)["stages"]) == 1


def test_a_start_that_came_to_nothing_leaves_the_folder_free(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", domain_rows("sums")[:12])
    with pytest.raises(DataError):
        train(stream(skills=[str(few)]))
    write_lines(few, domain_rows("sums"))
    assert len(train(stream(skills=[str(few)], max_steps=2))["stages"]) == 1


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


def test_a_warm_start_of_another_shape_starts_from_nothing(
    stream: Callable[..., RunConfig], tiny_rows: dict[str, Path]
) -> None:
    wide = {"skill": "sums", "datasets": [str(tiny_rows["sums"])], "lora_r": 16}
    assert len(train(stream(skills=[str(tiny_rows["capitals"]), wide], warm_start=True))["stages"]) == 2


def test_the_hundredth_stage_comes_after_the_eleventh() -> None:
    names = ["02-b", "100-c", "11-a"]
    assert sorted(map(Path, names), key=number_of) == [Path("02-b"), Path("11-a"), Path("100-c")]


def test_what_is_no_run_is_not_taken_back(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no config\.yaml"):
        rollback(tmp_path / "nothing", "capitals")
    assert not (tmp_path / "nothing").exists()
