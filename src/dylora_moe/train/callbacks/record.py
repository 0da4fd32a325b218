"""Writes what the Trainer logs to `metrics.jsonl`, one line a log."""

import time
from typing import Any

from transformers import TrainerCallback

from dylora_moe.run_dir import METRICS, RunDir


class RecordMetrics(TrainerCallback):
    """One JSON line for each log: step, epoch, seconds since the start, and the figures."""

    def __init__(self, run: RunDir) -> None:
        self.run, self._start = run, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and state.is_world_process_zero:
            seconds = round(time.monotonic() - self._start, 3)
            self.run.append(METRICS, {"step": state.global_step, "epoch": state.epoch, "seconds": seconds, **logs})
