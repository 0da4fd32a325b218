"""How to make a run fit: parts of a batch that do, or what to change when none does."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dylora_moe.errors import RunError
from dylora_moe.train.fit.estimate import Estimate, Estimator, Workload
from dylora_moe.train.fit.trace import Pass
from dylora_moe.train.fit.twin import Changes
from dylora_moe.train.memory import keeps_freed_memory
from dylora_moe.tuner.inspect import decoder_layers

MARGIN = 0.1
"""Share of the available memory that stays free: for what an estimate is off by (docs/log.md), and other programs."""

# With glibc 2.36, where freed memory is not given back (docs/log.md): what is held beyond tensors is 0.19 to 0.26 of
# the activations; and all that is held was at most 2.02 times the tensors, in six kinds of runs.
_KEPT_OF_ACTIVATIONS = 0.22
_KEPT_AT_MOST = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a run fits.

    Attributes:
        split: Parts in which each batch of training is computed.
        evaluation_split: Parts of a batch of evaluation.
        estimate: Of the run so computed.
        gives_back: Whether freed memory is to be given back (`return_freed_memory`), which takes time: where the run
            might not fit otherwise, and where activations are computed again to save memory.
    """

    split: int
    evaluation_split: int
    estimate: Estimate
    gives_back: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A setting to change, and what the run then needs at its worst moment, in bytes."""

    setting: str
    peak: int
    saving: int
    fits: bool


def choose_split(fits: Callable[[int], bool], rows: int) -> int | None:
    """The smallest power of two, at most `rows`, whose parts of `split_rows(rows, split)` rows fit; None if none."""
    split = 1
    while split <= rows:
        if fits(split_rows(rows, split)):
            return split
        split *= 2
    return None


def split_rows(rows: int, split: int) -> int:
    """Rows of the largest part of a batch."""
    return -(-rows // split)


def make_plan(estimator: Estimator, work: Workload, available: int, *, margin: float = MARGIN) -> Plan:
    """Split batches, of training and of evaluation each for itself, until both fit.

    Args:
        estimator: Of the model.
        work: The run as it is set.
        available: Bytes that the process may hold in all.
        margin: Share of them that stays free.

    Raises:
        RunError: One row at a time does not fit. The text says what to change and what that saves.
    """
    room = int(available * (1 - margin))

    def training(rows: int) -> Workload:
        changed = replace(work, train=replace(work.train, rows=rows), evaluation=None)
        return replace(changed, accumulates=work.accumulates or rows < work.train.rows)

    split = choose_split(lambda rows: estimator(training(rows)).peak <= room, work.train.rows)
    if split is None:
        raise RunError(_explain(estimator, training(1), available, room))
    fitting = training(split_rows(work.train.rows, split))
    evaluation_split, evaluation = 1, work.evaluation
    if evaluation is not None:

        def both(rows: int) -> Workload:
            return replace(fitting, evaluation=replace(evaluation, rows=rows))

        found = choose_split(lambda rows: estimator(both(rows)).peak <= room, evaluation.rows)
        if found is None:
            raise RunError(_explain(estimator, both(1), available, room))
        evaluation_split, fitting = found, both(split_rows(evaluation.rows, found))
    estimate = estimator(fitting)
    keeps = keeps_freed_memory(estimator.model.device)
    gives_back = keeps and (work.gradient_checkpointing or estimate.peak * _KEPT_AT_MOST > room)
    if keeps and not gives_back:
        kept = round(_KEPT_OF_ACTIVATIONS * estimate.activations)
        estimate = replace(estimate, allocator=kept, peak=estimate.peak + kept)
    return Plan(split=split, evaluation_split=evaluation_split, estimate=estimate, gives_back=gives_back)


def suggest(estimator: Estimator, work: Workload, room: int) -> list[Suggestion]:
    """Single changes that would save memory, largest saving first; those that save nothing are left out.

    Args:
        estimator: Of the model.
        work: The run as it would be.
        room: Bytes that it may take.
    """
    now = estimator(work).peak
    found = []
    for setting, estimate in _variants(estimator, work):
        saving = now - estimate.peak
        if saving > 0:
            found.append(Suggestion(setting=setting, peak=estimate.peak, saving=saving, fits=estimate.peak <= room))
    return sorted(found, key=lambda suggestion: -suggestion.saving)


def _variants(estimator: Estimator, work: Workload) -> list[tuple[str, Estimate]]:
    model = estimator.model
    made = []
    if not work.gradient_checkpointing:
        made.append(("gradient_checkpointing", estimator(replace(work, gradient_checkpointing=True))))
    if (length := work.train.tokens // 2) >= 1:
        made.append((f"max_length {length}", estimator(_shorter(work, length))))
    experts = len(model.expert_names)
    if (fewer := experts // 2) >= model.routing_config.top_k:
        made.append((f"num_experts {fewer}", estimator(work, Changes(num_experts=fewer))))
    rank = max(linear.r[name] for _, linear in model.routed_linears() for name in linear.r)
    if rank >= 16:  # packed experts have ranks in steps of 8
        made.append((f"lora_r {rank // 2 // 8 * 8}", estimator(work, Changes(rank=rank // 2 // 8 * 8))))
    layers, tap = len(decoder_layers(model.lm)[1]), model.routing_config.tap_layer
    if (higher := (layers + tap) // 2) > tap:
        made.append((f"tap_layer {higher}", estimator(work, Changes(tap_layer=higher))))
    if not getattr(model.lm, "is_quantized", False):
        made.append(("load_in_4bit", estimator(work, four_bit=True)))
    if model.lm.dtype == torch.float32:
        made.append(("bf16", estimator(work, Changes(dtype=torch.bfloat16))))
    return made


def _shorter(work: Workload, length: int) -> Workload:
    def cut(shape: Pass) -> Pass:
        return replace(shape, tokens=min(shape.tokens, length))

    evaluation = None if work.evaluation is None else cut(work.evaluation)
    return replace(work, train=cut(work.train), evaluation=evaluation)


def _explain(estimator: Estimator, work: Workload, available: int, room: int) -> str:
    estimate = estimator(work)
    shape = work.evaluation if estimate.worst == "evaluation" and work.evaluation is not None else work.train
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in estimate.parts().items() if size)
    changes = [
        f"--{suggestion.setting} saves {_gb(suggestion.saving)} GB{' and makes it fit' if suggestion.fits else ''}"
        for suggestion in suggest(estimator, work, room)
    ]
    return (
        f"A run must fit into memory with one row at a time: {_gb(room)} GB, of {_gb(available)} GB available, for a "
        f"row of {shape.tokens:,} tokens; got an estimate of {_gb(estimate.peak)} GB at its worst moment, the "
        f"{estimate.worst} ({parts}). Change one or more of these: {'; '.join(changes)}. Or choose a smaller base."
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"
