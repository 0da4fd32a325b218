"""Maturity under a real Trainer: it rises with the steps, goes on after a resume, and is whole at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.callbacks.line import Line
from transformers import Trainer, TrainerCallback, TrainingArguments

from dylora_moe.train.callbacks.mature import Mature

STEPS = 20


class Stop(TrainerCallback):
    """Saves after a step, and ends there."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[float]]:
    """(ratio, stop after, resume after) -> the maturities that were set, in their order."""

    def run(ratio: float, stop: int | None = None, resume: int | None = None) -> list[float]:
        found: list[float] = []
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"x": value, "labels": value} for value in torch.linspace(0.5, 1.5, 80)]
        callbacks = [Mature(found.append, ratio), Stop(stop)]
        trainer = Trainer(Line(), arguments, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resume}") if resume else None)
        return found

    return run


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 0.33, 1.0])
def test_it_rises_to_one_in_its_share_of_the_steps(train: Callable[..., list[float]], ratio: float) -> None:
    """Once an optimizer step, at its beginning."""
    expected = [min(1.0, step / (ratio * STEPS)) if ratio else 1.0 for step in range(STEPS)]
    assert train(ratio) == pytest.approx([*expected, 1.0])


def test_a_resumed_run_goes_on_where_it_was(train: Callable[..., list[float]]) -> None:
    whole, stopped = train(0.5), train(0.5, stop=6)
    assert stopped == [*whole[:6], 1.0]  # what ends early is used, and used whole
    assert train(0.5, resume=6) == whole[6:]
