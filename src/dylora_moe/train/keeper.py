"""What a run needs to go on: taken between any two steps, written as a checkpoint, and put back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from dylora_moe.train.checkpoint import find_fault, find_step, prune, write_checkpoint
from dylora_moe.train.state import (
    Saved,
    load_optimizer,
    load_weights,
    random_state,
    save_optimizer,
    save_weights,
    set_random_state,
)

if TYPE_CHECKING:
    from dylora_moe.train.trainer import RoutedTrainer

STATE, _LOOP = "state.json", "loop.safetensors"
RUN = "run"
"""Folder in a checkpoint with the files of the run's own, as they were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """All of a run between two steps that is not in the model or its optimizer.

    Attributes:
        random: Numbers to draw next.
        sums: What the loop adds up.
        must_evaluate: The end came in the evaluation after the step before, which is still to be made.
    """

    random: Saved
    sums: Saved
    must_evaluate: bool = False


class Keeper:
    """Writes the checkpoints of a run, and brings its trainer back to one.

    Args:
        folder: Of the checkpoints.
        keep: Checkpoints to keep besides the best ones.
        keep_best: Keep the checkpoint of the best evaluation, too.
        copy_run: Called with the path of a folder to make, for the run's own files.
        extra: Gives more to remember, as JSON has it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_best: bool,
        copy_run: Callable[[Path], None],
        extra: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.folder, self._keep, self._keep_best = folder, keep, keep_best
        self._copy_run, self._extra = copy_run, extra
        self._moment: Moment | None = None
        self._written: tuple[int, bool] | None = None

    def mark(self, trainer: "RoutedTrainer", *, must_evaluate: bool = False) -> None:
        """Remember this moment, from which the run would go on if it ended before the next."""
        self._moment = Moment(random=random_state(), sums=trainer.sums(), must_evaluate=must_evaluate)

    def forget(self) -> None:
        """The weights are about to change: until the next `mark` there is nothing to go on from."""
        self._moment = None

    @property
    def moment(self) -> Moment:
        """The one that `mark` remembered last."""
        assert self._moment is not None
        return self._moment

    def save(self, trainer: "RoutedTrainer") -> None:
        """Write a checkpoint of the moment that was marked last, unless there is one, and delete old ones."""
        step = trainer.state.global_step
        if self._moment is None or self._written == (step, self._moment.must_evaluate):
            return
        write_checkpoint(self.folder, step, lambda folder: self._fill(trainer, folder))
        self._written = (step, self._moment.must_evaluate)
        prune(self.folder, step=step, keep=self._keep, needed=_best_step if self._keep_best else lambda folder: None)

    def _fill(self, trainer: "RoutedTrainer", folder: Path) -> None:
        moment = self.moment
        save_weights(trainer.routed, folder)
        optimizer: Any = trainer.optimizer
        schedule: Any = trainer.lr_scheduler
        scaler = trainer.accelerator.scaler
        record = {
            "optimizer": save_optimizer(optimizer, folder),
            "schedule": schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": moment.random.record,
            "sums": moment.sums.record,
            "must_evaluate": moment.must_evaluate,
            "extra": dict(self._extra()),
        }
        tensors = {f"random.{name}": value for name, value in moment.random.tensors.items()}
        tensors |= {f"sums.{name}": value.cpu() for name, value in moment.sums.tensors.items()}
        save_file(tensors, folder / _LOOP)
        (folder / STATE).write_text(json.dumps(record), encoding="utf-8")
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self._copy_run(folder / RUN)

    def find_best(self, step: int) -> tuple[Path | None, str | None]:
        """The checkpoint of a step, or why there is none that can be used."""
        folder = find_step(self.folder, step)
        if folder is None:
            return None, "it is missing"
        fault = find_fault(folder)
        return (folder, None) if fault is None else (None, fault)


class Checkpoint:
    """Reads a checkpoint that was found sound; what is in memory outlives it.

    Args:
        folder: Of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self._loop = load_file(folder / _LOOP)

    @property
    def must_evaluate(self) -> bool:
        """Of its moment."""
        return self.record["must_evaluate"]

    @property
    def extra(self) -> dict[str, Any]:
        """What else was to be remembered."""
        return self.record["extra"]

    def trainer_state(self) -> TrainerState:
        """transformers' own record."""
        return TrainerState.load_from_json(str(self.folder / TRAINER_STATE_NAME))

    def put_weights(self, trainer: "RoutedTrainer") -> None:
        """Set experts and router."""
        load_weights(trainer.routed, self.folder)

    def put_optimizer(self, trainer: "RoutedTrainer") -> None:
        """Set optimizer and schedule."""
        optimizer: Any = trainer.optimizer
        schedule: Any = trainer.lr_scheduler
        load_optimizer(optimizer, self.folder, self.record["optimizer"])
        schedule.load_state_dict(self.record["schedule"])

    def put_scaler(self, trainer: "RoutedTrainer") -> None:
        """Set the scaling of a float16 loss."""
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(self.record["scaler"])

    def put_random(self) -> None:
        """Set the random numbers."""
        set_random_state(Saved(tensors=self._tensors("random."), record=self.record["random"]))

    def put_sums(self, trainer: "RoutedTrainer") -> None:
        """Set what the loop adds up."""
        trainer.set_sums(Saved(tensors=self._tensors("sums."), record=self.record["sums"]))

    def _tensors(self, prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in self._loop.items() if name.startswith(prefix)}


def _best_step(folder: Path) -> int | None:
    """The step of the best evaluation that a checkpoint knows."""
    try:
        return json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["best_global_step"]
    except (OSError, ValueError, KeyError):
        return None
