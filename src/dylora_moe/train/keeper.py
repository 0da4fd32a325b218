"""What a run needs to go on: taken between any two steps, written as a checkpoint, and put back."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from dylora_moe import ranks
from dylora_moe.train.checkpoint import find_fault, find_step, prune, write_checkpoint
from dylora_moe.train.spreading import spread
from dylora_moe.train.state import (
    Saved,
    load_optimizer,
    load_weights,
    random_state,
    save_optimizer,
    save_weights,
    seed_rank,
    set_random_state,
)
from dylora_moe.train.sums import put_sums, read_sums

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
        saved: Called when there is a new one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_best: bool,
        copy_run: Callable[[Path], None],
        extra: Callable[[], Mapping[str, Any]] = dict,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self._keep, self._keep_best = folder, keep, keep_best
        self._copy_run, self._extra, self._saved = copy_run, extra, saved
        self._moment: Moment | None = None
        self._written: tuple[int, bool] | None = None

    def mark(self, trainer: "RoutedTrainer", *, must_evaluate: bool = False) -> None:
        """Remember this moment, from which the run would go on if it ended before the next."""
        self._moment = Moment(random=random_state(), sums=read_sums(trainer), must_evaluate=must_evaluate)

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
        tensors = _of_all_ranks(self._moment)
        optimizer: Any = trainer.optimizer
        state = optimizer.state_dict()  # by all: it may be divided among them
        ranks.by_first(lambda: self._write(trainer, step, tensors, state))
        self._written = (step, self._moment.must_evaluate)

    def _write(
        self, trainer: "RoutedTrainer", step: int, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Any]
    ) -> None:
        write_checkpoint(self.folder, step, lambda folder: self._fill(trainer, folder, tensors, optimizer))
        prune(self.folder, step=step, keep=self._keep, needed=_best_step if self._keep_best else lambda folder: None)
        self._saved()

    def _fill(
        self, trainer: "RoutedTrainer", folder: Path, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Any]
    ) -> None:
        moment = self.moment
        save_weights(trainer.routed, folder)
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
            "ranks": ranks.count(),
        }
        save_file(dict(tensors), folder / _LOOP)
        (folder / STATE).write_text(json.dumps(record), encoding="utf-8")
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self._copy_run(folder / RUN)

    def find_best(self, step: int) -> tuple[Path | None, str | None]:
        """A step's checkpoint, for all processes, or why there is none that can be used."""
        found, fault = ranks.by_first(lambda: self._find(step))
        if found is None:
            return None, fault
        spread(Path(found))
        return Path(found), None

    def _find(self, step: int) -> tuple[str | None, str | None]:
        folder = find_step(self.folder, step)
        if folder is None:
            return None, "it is missing"
        fault = find_fault(folder)
        return (str(folder), None) if fault is None else (None, fault)


def _of_all_ranks(moment: Moment) -> dict[str, Tensor]:
    """The tensors of a moment, of the first process under their names and of each other one behind its number."""
    own = {f"random.{name}": value for name, value in moment.random.tensors.items()}
    own |= {f"sums.{name}": value.cpu() for name, value in moment.sums.tensors.items()}
    return {_name_of(rank, name): value for name, mine in own.items() for rank, value in enumerate(ranks.of_each(mine))}


def _name_of(rank: int, name: str) -> str:
    return f"rank{rank}.{name}" if rank else name


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
        """Set the random numbers: of this process, where a process of its number wrote, else new ones."""
        own = self._tensors("random.", ranks.rank())
        state = own or self._tensors("random.", 0)
        set_random_state(Saved(tensors=state, record=self.record["random"]))
        if not own:
            seed_rank(f"{self.folder.name}/{hashlib.sha256(state['cpu'].numpy().tobytes()).hexdigest()}")

    def put_sums(self, trainer: "RoutedTrainer") -> None:
        """Set what the loop adds up: as it was, or with another number of processes so that it makes the same sums."""
        saved = [self._tensors("sums.", rank) for rank in range(self.record.get("ranks", 1))]
        own = saved[ranks.rank()] if len(saved) == ranks.count() else _shared_anew(saved)
        put_sums(trainer, Saved(tensors=own, record=self.record["sums"]))

    def _tensors(self, kind: str, rank: int) -> dict[str, Tensor]:
        prefix = _name_of(rank, kind)
        return {name.removeprefix(prefix): value for name, value in self._loop.items() if name.startswith(prefix)}


def _shared_anew(saved: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Counts go to the first process; the loss, of which the mean over processes is taken, to all alike."""
    sums = {name: torch.stack([of_rank[name] for of_rank in saved]).sum(0) for name in saved[0]}
    counts = {name: value if ranks.is_first() else torch.zeros_like(value) for name, value in sums.items()}
    return {**counts, "loss": sums["loss"] / len(saved)}


def _best_step(folder: Path) -> int | None:
    """The step of the best evaluation that a checkpoint knows."""
    try:
        return json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["best_global_step"]
    except (OSError, ValueError, KeyError):
        return None
