"""An expert that grows up: immature it works among the others, mature it works alone."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Mature(TrainerCallback):
    """Sets the maturity of an expert by the step, so that a resumed run goes on where it was.

    Args:
        set_maturity: Takes it, 0 to 1.
        ratio: Share of the run's steps in which it rises to 1.
    """

    def __init__(self, set_maturity: Callable[[float], None], ratio: float) -> None:
        self._set_maturity, self._ratio = set_maturity, ratio

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rising = self._ratio * state.max_steps
        self._set_maturity(min(1.0, state.global_step / rising) if rising else 1.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set_maturity(1.0)
