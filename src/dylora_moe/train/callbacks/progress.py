"""The lines that a person sees of a training, on a terminal and elsewhere."""

from typing import Any

from rich.console import Console
from transformers import TrainerCallback


class ShowProgress(TrainerCallback):
    """A line for each log and each evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.console.print(f"Training for {state.max_steps} steps.")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            router = f"  load entropy {logs['load_entropy']:.2f}" if "load_entropy" in logs else ""
            self.console.print(
                f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.2e}  {logs['tokens_per_second']:.0f} tokens/s{router}",
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
