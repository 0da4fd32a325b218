"""Tells warning signs in what the Trainer logs, once each, and keeps them in the run folder."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from dylora_moe.run_dir import WARNINGS, RunDir
from dylora_moe.train.signs import Setup, new_signs


class Watch(TrainerCallback):
    """Looks at the Trainer's history after each log; it has no state of its own that a resumed run would lack.

    Args:
        run: Gets a JSON line for each sign.
        setup: Of the run; the number of steps is taken from the Trainer.
        tell: Takes one line for a person.

    Attributes:
        base_loss: Mean validation loss before training, once it is known.
    """

    def __init__(self, run: RunDir, setup: Setup, tell: Callable[[str], None]) -> None:
        self.run, self.setup, self.tell = run, setup, tell
        self.base_loss = setup.base_loss

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        setup = replace(self.setup, max_steps=state.max_steps, base_loss=self.base_loss)
        for sign in new_signs(state.log_history, setup):
            self.run.append(WARNINGS, {"step": sign.step, "name": sign.name, "seen": sign.seen, "advice": sign.advice})
            self.tell(f"Warning at step {sign.step}: {sign.text}")
