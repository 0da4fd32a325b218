"""What a stream can do after a stage: every skill learned so far, routed as in use, and general text."""

from collections.abc import Mapping, Sequence

from dylora_moe.data.batching import TokenizedRow, pad_token_id
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.evaluate.accuracy import MAX_LABELS, labels_of, measure_accuracy
from dylora_moe.evaluate.forgetting import StageFigures
from dylora_moe.evaluate.general import general_rows
from dylora_moe.evaluate.losses import Evaluation
from dylora_moe.train.evaluator import Evaluator
from dylora_moe.train.session import Stages
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.stream import Stream
from dylora_moe.tuner.head import read_head

_GENERAL = "general text"
_GENERAL_ROWS = 16  # of 128 tokens
_FEW = 4 * MAX_LABELS  # rows in which labels come again


def make_evaluator(stream: Stream, skill: str, stages: Stages) -> Evaluator:
    """Of the validation rows of one skill."""
    return _evaluator(stream, {skill: stream.data[skill].validation[skill]}, stages)


def measure_at_home(stream: Stream, skills: Sequence[str], stages: Stages, stop: StopSignals) -> None:
    """Note in the library how well the expert of each of these skills does it, whatever the router says."""
    for name in skills:
        with stream.model.forced(stream.library.experts[name]):
            loss = make_evaluator(stream, name, stages).run(stream.model, stop.check).mean_loss
        stream.library = stream.library.with_loss(name, loss)


def measure_stage(
    stream: Stream, stages: Stages, stop: StopSignals, *, skill: str | None = None, before: float | None = None
) -> StageFigures:
    """Every skill of the library by itself, the newest included.

    Args:
        stream: With the model and the library as the stage leaves them.
        stages: Shows a line.
        stop: May end it early.
        skill: That was learned; None where none was.
        before: Loss on it before it was learned.
    """
    stages.tell(f"Measuring {len(stream.library.skills)} skills ...")
    found = {name: make_evaluator(stream, name, stages).run(stream.model, stop.check) for name in stream.library.skills}
    return StageFigures(
        skill=skill,
        expert=None if skill is None else stream.library.experts[skill],
        before=before,
        losses={name: evaluation.mean_loss for name, evaluation in found.items()},
        accuracies=_accuracies(stream, stop),
        routed={name: _routed(evaluation, stream) for name, evaluation in found.items()},
        unsure={name: evaluation.routing.unsure if evaluation.routing else 0.0 for name, evaluation in found.items()},
        general=_general(stream, stages, stop),
    )


def measure_base(stream: Stream, stages: Stages, stop: StopSignals) -> float:
    """The base's loss on general text, nats a token."""
    stages.tell("Measuring the base on general text ...")
    with stream.model.disabled():
        return _general(stream, stages, stop)


def _general(stream: Stream, stages: Stages, stop: StopSignals) -> float:
    rows = general_rows(stream.base.tokenizer, rows=_GENERAL_ROWS)
    return _evaluator(stream, {_GENERAL: rows}, stages).run(stream.model, stop.check).mean_loss


def _routed(evaluation: Evaluation, stream: Stream) -> dict[str, float]:
    if evaluation.routing is None:  # one expert serves all
        return {stream.model.expert_names[0]: 1.0}
    # The table is of what experts answered; prompts that the base answered went to none.
    answered = 1 - evaluation.routing.unsure if stream.config.unsure_answer == "base" else 1.0
    return {
        name: share * answered
        for name, share in zip(evaluation.routing.experts, evaluation.routing.table[0], strict=True)
    }


def _accuracies(stream: Stream, stop: StopSignals) -> dict[str, float]:
    """Of the skills whose answers are labels."""
    found = {}
    for name in stream.library.skills:
        data = stream.data[name]
        examples = data.validation_examples[name]
        if labels_of(list(examples), _trained_answers(stream, name)) is not None:
            found[name] = measure_accuracy(
                stream.model,
                stream.base.tokenizer,
                list(examples),
                batch_size=stream.config.eval_batch_size,
                end_token_ids=data.summary.end_token_ids,
                before_batch=stop.check,
            )
    return found


def _trained_answers(stream: Stream, name: str) -> list[str]:
    """Answers of training rows of a skill, as many as tell whether they are labels."""
    rows = stream.data[name].train
    labels = [[label for label in rows[place].labels if label != IGNORED] for place in range(min(len(rows), _FEW))]
    return stream.base.tokenizer.batch_decode(labels, skip_special_tokens=True)


def _evaluator(stream: Stream, rows: Mapping[str, Sequence[TokenizedRow]], stages: Stages) -> Evaluator:
    return Evaluator(
        read_head(stream.model.lm),
        rows,
        rows=stream.config.eval_batch_size,
        pad_token_id=pad_token_id(stream.base.tokenizer),
        tell=stages.tell,
    )
