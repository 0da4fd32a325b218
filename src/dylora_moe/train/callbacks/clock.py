"""Time spent in training steps, and what else a step begins with."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Seconds spent in training steps, evaluations left out.

    Args:
        begin: Called when a step begins.
        before_update: Called before the optimizer changes weights.
    """

    def __init__(self, begin: Callable[[], None], before_update: Callable[[], None]) -> None:
        self._begin, self._before_update = begin, before_update
        self._spent, self._began = 0.0, 0.0

    def take(self) -> float:
        """Seconds since the last call."""
        spent, self._spent = self._spent, 0.0
        return spent

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._spent += time.perf_counter() - self._began


class AtStart(TrainerCallback):
    """Calls a function when the Trainer is about to take its first step, its own sums set to nothing."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._act()
