"""Streams of skills: what is decided, what stays as it was, and that a stream goes on wherever it stopped."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import DOMAINS, domain_rows, write_lines
from tests.train.streams import Stop, beside, outcome, stop_at
from tests.train.whole import start

from dylora_moe.bases import load_base
from dylora_moe.config import RunConfig
from dylora_moe.errors import ConfigError, DataError, RunError
from dylora_moe.evaluate.run import evaluate_run
from dylora_moe.run_dir import RunDir
from dylora_moe.skills.library import load_library
from dylora_moe.train import continual, fitting
from dylora_moe.train import stream as stream_module
from dylora_moe.train.run import train
from dylora_moe.tuner import load_model
from dylora_moe.tuner.prototype import PrototypeRouter

Settings = Callable[..., dict[str, Any]]


def test_new_skills_get_experts_and_old_ones_stay_as_they_are(whole: Any) -> None:
    _, run, result = whole
    assert [stage["decision"]["kind"] for stage in result["stages"]] == ["grow"] * 3
    assert result["experts"] == list(DOMAINS)
    stages = sorted((run / "stages").iterdir())
    assert [stage.name for stage in stages] == ["01-capitals", "02-functions", "03-sums"]
    for earlier, later in pairwise(stages):
        for file in (earlier / "final" / "experts").rglob("*"):
            kept = later / "final" / file.relative_to(earlier / "final")
            if file.is_file():
                assert file.read_bytes() == kept.read_bytes() and file.samefile(kept)  # once on the disk
    assert (run / "final" / "experts" / "sums").is_dir() and "<html" in (run / "report.html").read_text()


def test_what_is_learned_is_neither_forgotten_nor_misrouted(whole: Any) -> None:
    _, run, result = whole
    matrix = result["summary"]["loss"]["matrix"]
    for column in range(3):
        assert len({row[column] for row in matrix[column:]}) == 1
        assert matrix[column][column] < result["stages"][column]["base_loss"]
    assert result["summary"]["loss"]["backward_transfer"] == result["summary"]["loss"]["forgetting"] == 0.0
    assert result["summary"]["routing"]["accuracy"] == 1.0
    for place, (name, skill) in enumerate(load_library(run.path).skills.items()):
        assert name == DOMAINS[place] and skill.record.loss == pytest.approx(matrix[place][place], abs=1e-6)
        assert skill.record.base_loss == result["stages"][place]["base_loss"]
        assert not np.allclose(skill.sample.prompts, skill.sample.answers)
    assert evaluate_run(run.path, tell=lambda text: None)["routed"]["mean_loss"] == pytest.approx(
        result["summary"]["loss"]["average"], abs=1e-6
    )


def test_rows_of_a_stream_are_those_of_the_skills_it_has_in_the_order_it_learned_them(
    whole: Any, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole[1].path, tmp_path / "run"))
    for old, new in (("03-sums", "99-sums"), ("01-capitals", "100-capitals")):  # not in the order of their names
        (run / "stages" / old).rename(run / "stages" / new)
    found = evaluate_run(run, tell=lambda text: None)["routed"]
    assert [domain["domain"] for domain in found["domains"]] == ["functions", "sums", "capitals"]
    skills = json.loads((run / "skills.json").read_text())
    del skills["skills"][2]  # as while a stream goes on, whose model is not yet that of the last stage
    (run / "skills.json").write_text(json.dumps(skills))
    found = evaluate_run(run, tell=lambda text: None)["routed"]
    assert [domain["domain"] for domain in found["domains"]] == ["functions", "capitals"]


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
    (stream_module, "save_library", 1),
    (continual, "read_features", 2),
    (continual, "examine", 1),
    (continual, "fit_prototypes", 1),
    (fitting, "plan_memory", 1),
    (fitting, "calibrate_router", 1),
    (fitting, "save_model", 1),
    (continual, "measure_stage", 1),
    (stream_module, "share_files", 1),
    (stream_module, "save_library", 1),
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


def test_a_killed_stream_ends_the_same(whole: Any) -> None:
    """By SIGKILL in the second skill's training, between its steps."""
    config = beside(whole, "killed")
    process = start(config)
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
    library, losses = load_library(config.run_dir).skills, result["summary"]["loss"]["matrix"][-1]
    assert [library[name].record.loss for name in ("capitals", "sums")] == pytest.approx(losses, abs=1e-6)
    trained = RunDir(config.run_dir / "stages" / "02-sums").read("result.json")["trained"]
    assert {part["domain"] for part in trained if part["rows"]} == {"capitals", "sums"}  # the old skill, too


@pytest.mark.parametrize("answer", ["base", "dense"])
def test_prompts_that_the_base_answers_went_to_no_expert(stream: Callable[..., RunConfig], answer: str) -> None:
    """The radius of each skill leaves out about half of its own prompts."""
    result = train(stream(unsure_rate=0.45, unsure_answer=answer, skills=stream().skills[:2]))
    figures = result["stages"][-1]["figures"]
    assert any(0 < share < 1 for share in figures["unsure"].values())
    for skill, routed in figures["routed"].items():
        answered = 1 - figures["unsure"][skill] if answer == "base" else 1.0
        assert sum(routed.values()) == pytest.approx(answered)


def test_labels_are_told_by_all_rows_of_a_skill(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Three labels in two validation rows say nothing; right answers are counted all the same."""
    rows = [{"prompt": row["prompt"], "completion": "abc"[place % 3]} for place, row in enumerate(domain_rows("sums"))]
    skills = [str(write_lines(tmp_path / "letters.jsonl", rows)), *stream().skills[:1]]
    figures = train(stream(skills=skills, max_steps=1))["stages"][-1]["figures"]
    assert list(figures["accuracies"]) == ["letters"] and len(figures["losses"]) == 2


def test_with_no_foreign_prompts_none_is_unsure(stream: Callable[..., RunConfig]) -> None:
    config = stream(unsure_rate=0, skills=stream().skills[:2], max_steps=1)
    assert train(config)["summary"]["routing"]["unsure"] == (0.0, 0.0)
    model = load_model(load_base(config.base_model, dtype=torch.float32).model, config.run_dir / "final")
    (router,) = model.routers.values()
    assert isinstance(router, PrototypeRouter) and router.sure(1e3 * torch.randn(50, router.projection.shape[0])).all()


def test_the_router_may_be_learned(stream: Callable[..., RunConfig]) -> None:
    """Anew after each skill, from what the library keeps; by one expert's training it is not moved."""
    config = stream(stream_router="learned", weight_decay=0.5)
    result = train(config)
    assert [stage["decision"]["kind"] for stage in result["stages"]] == ["grow"] * 3
    assert result["summary"]["routing"]["accuracy"] == 1.0 and result["summary"]["loss"]["backward_transfer"] == 0.0
    assert set(result["summary"]["routing"]["unsure"]) == {0.0}
    base = load_base(config.base_model, dtype=torch.float32)
    model = load_model(base.model, config.run_dir / "final")
    written = {name: value.clone() for name, value in model.routers.state_dict().items()}
    library = load_library(config.run_dir)
    prompts = [row for sample in library.prompts.values() for row in sample]
    model.teach_routers(np.stack(prompts), [library.experts[name] for name, p in library.prompts.items() for _ in p])
    assert all(torch.equal(value, written[name]) for name, value in model.routers.state_dict().items())


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
    with pytest.raises(ConfigError, match="maturity_ratio must be 0 with stream_router: learned"):
        stream(maturity_ratio=0.1, stream_router="learned")


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
    library, losses = load_library(config.run_dir).skills, result["summary"]["loss"]["matrix"][-1]
    assert [skill.record.loss for skill in library.values()] == pytest.approx(losses, abs=1e-6)


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


def test_a_warm_start_of_another_shape_starts_from_nothing(
    stream: Callable[..., RunConfig], tiny_rows: dict[str, Path]
) -> None:
    wide = {"skill": "sums", "datasets": [str(tiny_rows["sums"])], "lora_r": 16}
    assert len(train(stream(skills=[str(tiny_rows["capitals"]), wide], warm_start=True))["stages"]) == 2
