"""The live view of a training: what the Trainer says and the run folder holds -> a panel on a terminal."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.console import Console, RenderableType
from transformers import TrainerCallback

from dylora_moe.run_dir import METRICS, WARNINGS, RunDir
from dylora_moe.train.live.draw import draw
from dylora_moe.train.live.figures import Figures, History, Place
from dylora_moe.train.live.screen import Screen, can_draw
from dylora_moe.train.stopping import StopSignals


class LiveView(TrainerCallback):
    """Shows what is logged, and the step; it computes nothing on the model, and no error of it ends a run.

    It comes after the callbacks that write to the run folder. Where its console is no terminal, it does nothing.

    Args:
        console: To show it on.
        run: Folder of the training; what its lines say already is shown, too.
        stop: Its line on a signal goes above the panel.
        place: Of the training in a stream of skills.
    """

    def __init__(self, console: Console, run: RunDir, stop: StopSignals, place: Place | None = None) -> None:
        self._console, self._run, self._stop, self._place = console, run, stop, place
        self._screen = Screen(console, self._draw)
        self._history = History()
        self._step, self._began_at, self._began = 0, 0, 0.0
        self._figures: Figures | None = None
        self._announce: Callable[[str], None] = stop.announce

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not can_draw(self._console):
            return
        self._step = self._began_at = state.global_step
        self._began = time.monotonic()
        try:
            for line in self._run.read_lines(METRICS):
                self._history.add(line)
            self._update(state)
            self._screen.open()
        except Exception as error:
            self._screen.fail(error)
        self._stop.announce = self._say

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or not self._screen.is_on:
            return
        try:
            self._history.add(logs)
            self._update(state)
        except Exception as error:
            self._screen.fail(error)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last picture on the terminal; also after an error."""
        self._stop.announce = self._announce
        self._screen.close()

    def _say(self, line: str) -> None:
        (self._screen.post if self._screen.is_on else self._announce)(line)

    def _update(self, state: Any) -> None:
        self._figures = self._history.figures(
            name=self._run.path.name,
            step=self._step,
            max_steps=state.max_steps,
            elapsed_s=0.0,
            warnings=[f"Warning at step {line['step']}: {line['seen']}" for line in self._run.read_lines(WARNINGS)],
            place=self._place,
        )

    def _draw(self, width: int, height: int) -> RenderableType:
        assert self._figures is not None
        elapsed, made = time.monotonic() - self._began, self._step - self._began_at
        left = elapsed / made * (self._figures.max_steps - self._step) if made else None
        now = replace(self._figures, step=self._step, elapsed_s=elapsed, left_s=left)
        return draw(now, width=width, height=height)
