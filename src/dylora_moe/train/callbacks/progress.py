"""What a person sees while training: a bar with time left on a terminal, plain lines elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ShowProgress(TrainerCallback):
    """Steps, loss, tokens a second and time left; a line for each log and each evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.console.print(f"Training for {state.max_steps} steps.")
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[speed]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=state.max_steps, speed="")
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            speed = f"{logs['tokens_per_second']:.0f} tokens/s"
            if self._bar is not None:
                self._bar.update(self._task, speed=speed, description=f"loss {logs['loss']:.3f}")
            router = f"  load entropy {logs['load_entropy']:.2f}" if "load_entropy" in logs else ""
            self.console.print(
                f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.2e}  {speed}{router}",
                highlight=False,
                markup=False,
            )
        elif "eval_loss" in logs:
            losses = "  ".join(
                f"{key.removeprefix('eval_').removesuffix('_loss')} {value:.4f}"
                for key, value in logs.items()
                if key.startswith("eval_") and key != "eval_loss"
            )
            self.console.print(f"step {state.global_step:>5}  validation loss: {losses}", highlight=False, markup=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
