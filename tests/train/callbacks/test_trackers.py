"""What a real Trainer logs reaches TensorBoard, from the first process only."""

from pathlib import Path
from typing import Any

import torch
from tests.train.callbacks.line import Line
from transformers import Trainer, TrainerState, TrainingArguments

from dylora_moe.train.callbacks.trackers import Track
from dylora_moe.train.trackers import Trackers


def test_all_logs_of_the_first_process_are_tracked(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told: list[str] = []
    folder = tmp_path / "trackers"
    trackers = Trackers(["tensorboard"], folder=folder, run_name="a", config={}, environment={}, tell=told.append)
    trackers.start()
    track = Track(trackers, None)
    state: Any = TrainerState(global_step=1, is_world_process_zero=False)
    track.on_log(None, state, None, logs={"loss": 9.0})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"x": value, "labels": value} for value in torch.linspace(0.5, 1.5, 64)]
    trainer = Trainer(Line(), arguments, train_dataset=rows, callbacks=[track])  # type: ignore[arg-type]
    trainer.train()
    trackers.finish()
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    logged = [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
    tracked = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert [step for step, _ in tracked] == [2, 4, 6]
    assert torch.allclose(torch.tensor(tracked), torch.tensor(logged))
    assert {"train/grad_norm", "train/learning_rate", "train/epoch"} <= set(found.Tags()["scalars"])
    assert len(told) == 1
