"""Watching a real Trainer that explodes: told once, kept in the run folder, the same after a resume; and memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.callbacks.line import Line
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from dylora_moe.run_dir import WARNINGS, RunDir
from dylora_moe.train.callbacks.watch import Watch
from dylora_moe.train.signs import Setup

STEPS = 40
SETUP = Setup(
    max_steps=1, warmup_ratio=0.0, learning_rate=0.01, rows_per_step=4, top_k=1, domain_shares=(1.0,), base_loss=None
)


class Explode(TrainerCallback):
    """Makes steps go wrong from one on; the last step before a stop is saved."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step > STEPS - 10:
            with torch.no_grad():
                model.weight.add_(1.5)
        control.should_save = control.should_training_stop = state.global_step == self.stop


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[str]]:
    """(run, stop, resume) -> what was told."""

    def run(folder: RunDir, stop: int | None = None, resume: bool = False) -> list[str]:
        told: list[str] = []
        folder.path.mkdir(exist_ok=True)
        arguments = TrainingArguments(
            output_dir=str(folder / "out"),
            max_steps=STEPS,
            logging_steps=1,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        x = torch.linspace(0.5, 1.5, 64)
        rows = [{"x": value, "labels": value} for value in x]
        callbacks = [Explode(stop), Watch(folder, SETUP, told.append)]
        trainer = Trainer(Line(), arguments, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{STEPS - 5}") if resume else None)
        return told

    return run


def test_what_explodes_is_told_once_and_kept(train: Callable[..., list[str]], tmp_path: Path) -> None:
    whole, stopped = RunDir(tmp_path / "whole"), RunDir(tmp_path / "stopped")
    (told,) = train(whole)
    (line,) = whole.read_lines(WARNINGS)
    assert line["name"] == "loss_exploding" and STEPS - 10 < line["step"] < STEPS
    assert told == f"Warning at step {line['step']}: {line['seen']} {line['advice']}"
    assert "learning_rate (0.01)" in line["advice"]
    # Stopped after the sign was told, it is not told again.
    assert train(stopped, stop=STEPS - 5) == [told]
    assert train(stopped, resume=True) == []
    assert stopped.read_lines(WARNINGS) == [line]


@pytest.mark.parametrize(("base_loss", "steps"), [(None, [50]), (2.0, [])])
def test_the_loss_before_training_counts(tmp_path: Path, base_loss: float | None, steps: list[int]) -> None:
    """An evaluation that is better than the base's shows learning, whatever the training loss does."""
    flat = [{"step": 2 * (index + 1), "loss": 2.0} for index in range(25)]
    state = TrainerState(max_steps=60, log_history=[*flat[:24], {"step": 48, "eval_loss": 1.8}, flat[24]])
    run = RunDir(tmp_path)
    watch = Watch(run, SETUP, lambda text: None)
    watch.base_loss = base_loss
    other: Any = replace(state, is_world_process_zero=False)
    for now in (other, state):
        watch.on_log(None, now, None, logs=flat[24])
    assert [line["step"] for line in run.read_lines(WARNINGS)] == steps
