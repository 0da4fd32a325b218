"""What a trainer adds up between lines of metrics and since its start: read for a checkpoint, and put back."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from dylora_moe.evaluate.losses import Evaluation
from dylora_moe.train.state import Saved

if TYPE_CHECKING:
    from dylora_moe.train.trainer import RoutedTrainer


def read_sums(trainer: "RoutedTrainer") -> Saved:
    """What was summed up since the last line of metrics and since the start."""
    figures = trainer.figures.sums()
    record = {
        "figures": figures.record,
        "last_logged": trainer._globalstep_last_logged,
        "evaluated_at": trainer.evaluated_at,
        "evaluation": None if trainer.evaluation is None else asdict(trainer.evaluation),
        "best": None if trainer.best is None else asdict(trainer.best),
        "parts": trainer.parts,
        "eval_rows": trainer.evaluator.rows,
    }
    loss: Any = trainer._tr_loss
    return Saved(tensors={**figures.tensors, "loss": loss.clone()}, record=record)


def put_sums(trainer: "RoutedTrainer", saved: Saved) -> None:
    """Sum on from what `read_sums` gave."""
    sums, record = {name: value.to(trainer.args.device) for name, value in saved.tensors.items()}, saved.record
    trainer._tr_loss = sums.pop("loss").clone()
    trainer.figures.set_sums(sums, record["figures"])
    trainer._globalstep_last_logged = record["last_logged"]
    evaluation = TypeAdapter(Evaluation | None)
    trainer.evaluation, trainer.best = (evaluation.validate_python(record[name]) for name in ("evaluation", "best"))
    trainer.evaluated_at = record["evaluated_at"]
    # A machine with less memory than that of the checkpoint may have planned for more parts already.
    trainer.parts = max(trainer.parts, record["parts"])
    trainer.evaluator.rows = min(trainer.evaluator.rows, record["eval_rows"])
