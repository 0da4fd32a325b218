"""Gives what the Trainer logs to the run's trackers."""

from typing import Any

from transformers import TrainerCallback

from dylora_moe.train.trackers import Trackers


class Track(TrainerCallback):
    """Every log of the first process goes to all trackers."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and state.is_world_process_zero:
            self.trackers.log(state.global_step, logs)
