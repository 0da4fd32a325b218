"""A dry run measures what a run will need, leaves nothing behind, and stops for what would stop the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.remote.faults import Failing, failing
from tests.train.whole import HARD

from dylora_moe.config import RunConfig
from dylora_moe.errors import RunError
from dylora_moe.run_dir import RunDir
from dylora_moe.train import fitting, keeper, rehearsal
from dylora_moe.train.needs import count_work, largest_batch, make_workload
from dylora_moe.train.rehearsal import rehearse
from dylora_moe.train.run import train
from dylora_moe.train.session import build_trainer
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.trainer import RoutedTrainer

__all__ = ["failing"]


@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 96}, {"num_experts": 1}], ids=str)
def test_it_counts_what_the_run_then_does(tiny_config: Callable[..., RunConfig], changes: dict[str, Any]) -> None:
    config = tiny_config(**{**HARD, "max_steps": None, "num_epochs": 1.5, "load_best_model_at_end": False, **changes})
    found = rehearse(config)
    assert not config.output_dir.exists()
    result = train(config)
    run = RunDir(config.run_dir)
    assert found.counts.steps == result["steps"]
    evaluations = [line for line in run.read_lines("metrics.jsonl") if "eval_loss" in line]
    assert found.counts.evaluations == len(evaluations)
    saved = max(1, min(found.counts.saves, config.save_total_limit))
    folders = list((run / "checkpoints").iterdir())
    assert len(folders) == saved
    sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders]
    # The run's own lines are in a checkpoint too, and a tiny run has most of its bytes there.
    tensors = sum(file.stat().st_size for file in folders[0].rglob("*.safetensors"))
    assert tensors <= found.checkpoint <= sizes[0]
    kept = min(config.save_total_limit + 2, found.counts.saves + 1)  # also the best, and one being written
    assert found.disk == kept * found.checkpoint + found.final and found.final > 0
    assert found.run_s > 0 and found.peak > 0 and found.calibration.step_s > 0 and found.load_s > 0


def test_its_steps_are_on_the_largest_batch(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, shapes = RoutedTrainer.compute_loss, []

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RoutedTrainer, "compute_loss", spy)
    config = tiny_config(gradient_accumulation_steps=2, run_name="whole", max_steps=None, num_epochs=1)
    rehearse(config)
    tried = list(shapes)
    shapes.clear()
    train(config)
    assert len(tried) == 4 and len(set(tried)) == 1
    assert max(rows * tokens for rows, tokens in shapes) == tried[0][0] * tried[0][1]


def test_the_workload_is_that_of_the_largest_passes(make_session: Callable[..., Any]) -> None:
    session = make_session(gradient_accumulation_steps=2, eval_batch_size=4)
    trainer = build_trainer(session, stop=StopSignals(), tell=print)
    work = make_workload(session, trainer)
    rows = [session.data.train[index] for index in largest_batch(trainer)]
    assert (work.train.rows, work.train.tokens) == (len(rows), max(map(len, rows)))
    labelled = sum(label != -100 for row in rows for label in row.labels[1:])
    assert work.train.num_labelled == labelled and work.accumulates
    batches = [[session.data.train[index] for index in batch] for batch in trainer.sampler.plan(0)]
    areas = [len(batch) * max(map(len, batch)) for batch in batches]
    assert len(set(areas)) > 1 and work.train.rows * work.train.tokens == max(areas)
    assert work.evaluation is not None and work.evaluation.rows == 4
    assert work.evaluation.tokens == max(len(row) for domain in session.data.validation.values() for row in domain)
    assert count_work(session, trainer).steps == 4


def test_a_checkpoint_that_does_not_come_back_is_told(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper.Checkpoint, "put_weights", lambda self, trainer: None)
    with pytest.raises(RunError, match="must come back as it was written"):
        rehearse(tiny_config())


def test_a_run_that_does_not_fit_is_refused_before_it_starts(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dylora_moe.train import needs

    monkeypatch.setattr(needs, "available_memory", lambda device: 1000)
    monkeypatch.setattr(fitting, "plan_memory", needs.plan_memory)
    config = tiny_config()
    for attempt in (rehearse, train):
        with pytest.raises(RunError, match="must fit into memory"):
            attempt(config)
    assert not (config.run_dir / "config.yaml").exists()


def test_batches_are_split_when_that_makes_them_fit(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is just above what two rows need; the run learns the same as one that has all the memory."""
    from dylora_moe.train import needs
    from dylora_moe.train.fit import Estimator, make_plan

    config = tiny_config(lora_dropout=0.0, run_name="whole")
    whole = train(config)
    limits = []

    def tight(estimator: Estimator, work: Any, available: int) -> Any:
        from dataclasses import replace

        estimator.process = 0
        need = estimator(replace(work, train=replace(work.train, rows=2), accumulates=True, evaluation=None)).peak
        limits.append(need)
        return make_plan(estimator, replace(work, evaluation=None), need, margin=0.0)

    monkeypatch.setattr(needs, "make_plan", tight)
    monkeypatch.setattr(fitting, "plan_memory", needs.plan_memory)
    compute, rows = RoutedTrainer.compute_loss, set()

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows.add(len(inputs["input_ids"]))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RoutedTrainer, "compute_loss", spy)
    small = train(tiny_config(lora_dropout=0.0, run_name="small"))
    assert limits and rows <= {1, 2}
    assert small["after"]["mean_loss"] == pytest.approx(whole["after"]["mean_loss"], rel=1e-4)
    assert small["trained"] == whole["trained"]
    assert rehearsal.rehearse is rehearse


def test_a_dry_run_does_not_look_at_the_remote_folder(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, failing: type[Failing]
) -> None:
    failing.plan(1, until=10**9)
    rehearse(tiny_config(remote_dir=f"failing://{tmp_path / 'remote'}"))
    assert failing.count == 0
