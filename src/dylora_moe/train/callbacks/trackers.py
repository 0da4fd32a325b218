"""Gives what the Trainer logs to the run's trackers."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dylora_moe.train.checkpoint import find_step
from dylora_moe.train.trackers import Trackers


class Track(TrainerCallback):
    """Every log of the first process goes to all trackers, and its checkpoints to those that take them.

    Args:
        trackers: Of the run.
        checkpoints: Folder of those that another run can begin from.
    """

    def __init__(self, trackers: Trackers, checkpoints: Path | None) -> None:
        self.trackers, self._checkpoints = trackers, checkpoints

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and state.is_world_process_zero:
            self.trackers.log(state.global_step, logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._checkpoints is None or not state.is_world_process_zero:
            return
        step = state.global_step
        if folder := find_step(self._checkpoints, step):
            self.trackers.log_checkpoint(folder, step=step, is_best=state.best_global_step == step)
