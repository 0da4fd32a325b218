"""What a run is about to do, as shapes and counts: from these its memory, time and disk follow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dylora_moe import ranks
from dylora_moe.data.batching import PlannedBatchSampler, TokenizedRow
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.train.fit import Estimator, Pass, Plan, Workload, make_plan
from dylora_moe.train.memory import available_memory
from dylora_moe.train.session import Session
from dylora_moe.train.trainer import RoutedTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How often a run does what.

    Attributes:
        steps: Optimizer steps.
        step_tokens: Tokens of one on average, padding included.
        evaluations: Also that at the start.
        saves: Checkpoints by interval and at the end; new best evaluations make more.
    """

    steps: int
    step_tokens: float
    evaluations: int
    saves: int


def count_work(session: Session, trainer: RoutedTrainer) -> Counts:
    """Count what the settings ask for."""
    args, sampler = trainer.args, trainer.sampler
    per_epoch = -(-len(sampler) // args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    epoch_tokens = sum(len(batch) * _longest(sampler, batch) for batch in sampler.plan(0))
    eval_steps = int(args.eval_steps or 0) if session.config.eval_steps else 0
    return Counts(
        steps=steps,
        step_tokens=epoch_tokens / per_epoch,
        evaluations=1 + (-(-steps // eval_steps) if eval_steps else 1),
        saves=-(-steps // int(args.save_steps)),
    )


def largest_batch(trainer: RoutedTrainer) -> list[Any]:
    """The items of the batch that has most tokens in the first epoch, padding included; a process's share of it."""
    sampler = trainer.sampler
    shares = (batch[:: sampler.num_ranks] for batch in sampler.plan(0))
    return max(shares, key=lambda share: len(share) * _longest(sampler, share))


def make_workload(session: Session, trainer: RoutedTrainer) -> Workload:
    """The largest passes of training and of evaluation."""
    dataset: Any = trainer.train_dataset
    batch = trainer.data_collator([dataset[item] for item in largest_batch(trainer)])
    config = session.config
    return Workload(
        train=_pass_of(batch),
        evaluation=_evaluation_pass(list(session.data.validation.values()), config.eval_batch_size),
        accumulates=config.gradient_accumulation_steps > 1,
        gradient_checkpointing=config.gradient_checkpointing,
        autocast=torch.float16 if config.fp16 else None,
    )


def plan_memory(session: Session, trainer: RoutedTrainer) -> Plan:
    """How the run fits into this machine's memory.

    Raises:
        RunError: It does not; the text says what to change.
    """
    model = session.model
    available = available_memory(model.device)
    if model.device.type == "cpu":
        available //= ranks.on_this_machine()
    return make_plan(Estimator(model), make_workload(session, trainer), available)


def _longest(sampler: PlannedBatchSampler[Any], batch: Sequence[Any]) -> int:
    return max(sampler.size(item) for item in batch)


def _pass_of(batch: dict[str, Tensor]) -> Pass:
    rows, tokens = batch["input_ids"].shape
    labelled = float((batch["labels"][:, 1:] != IGNORED).float().mean())
    places = batch.get("position_ids")
    documents = 1 if places is None else int((places == 0).sum(1).max())
    return Pass(rows=rows, tokens=tokens, labelled=labelled, documents=documents)


def _evaluation_pass(domains: Sequence[Sequence[TokenizedRow]], rows: int) -> Pass:
    """The longest rows of a domain stand together; the domain is that of the longest of all."""
    lengths = [sorted((len(row), _labelled(row)) for row in domain)[-rows:] for domain in domains]
    longest = max(lengths, key=lambda found: found[-1][0] * len(found))
    tokens = longest[-1][0]
    return Pass(rows=len(longest), tokens=tokens, labelled=sum(n for _, n in longest) / (len(longest) * tokens))


def _labelled(row: TokenizedRow) -> int:
    return sum(label != IGNORED for label in row.labels[1:])
