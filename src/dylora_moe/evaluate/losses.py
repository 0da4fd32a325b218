"""Loss of a model on rows of several domains, and how it routed them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dylora_moe.data.batching import NO_DOMAIN, Collator, TokenizedRow
from dylora_moe.evaluate.routing import RoutingMeter, RoutingReport
from dylora_moe.tuner import DyLoraModel
from dylora_moe.tuner.head import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainLoss:
    """Mean negative log-likelihood, in nats a labelled token, over a domain's rows."""

    domain: str
    loss: float
    perplexity: float
    tokens: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Losses of all domains, their plain mean, and the routing (None for a single LoRA or a forced expert)."""

    domains: tuple[DomainLoss, ...]
    mean_loss: float
    routing: RoutingReport | None


@torch.no_grad()
def evaluate_domains(
    model: DyLoraModel,
    head: Head,
    rows: Mapping[str, Sequence[TokenizedRow]],
    *,
    batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run every row once, in evaluation mode, rows of like length together.

    Args:
        model: Left in the mode it was in.
        head: Of the same base.
        rows: Domain -> rows; each row's `domain` is the index of its domain in this order.
        batch_size: Rows in one pass.
        pad_token_id: What fills short rows.
        before_batch: Called before each pass; what it raises ends the evaluation.
    """
    was_training = model.training
    model.eval()
    collate, meter = Collator(pad_token_id=pad_token_id), RoutingMeter(model.expert_names, tuple(rows))
    try:
        results = [
            _evaluate_one(model, head, name, index, domain_rows, batch_size, collate, meter, before_batch)
            for index, (name, domain_rows) in enumerate(rows.items())
        ]
    finally:
        model.train(was_training)
    mean = sum(result.loss for result in results) / len(results)
    return Evaluation(domains=tuple(results), mean_loss=mean, routing=meter.report())


def _evaluate_one(
    model: DyLoraModel,
    head: Head,
    name: str,
    index: int,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    collate: Collator,
    meter: RoutingMeter,
    before_batch: Callable[[], None],
) -> DomainLoss:
    lengths = [len(row) for row in rows]
    ordered = sorted(range(len(rows)), key=lengths.__getitem__)
    total, tokens = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        before_batch()
        chosen = collate([rows[place] for place in ordered[start : start + batch_size]])
        batch = {key: value.to(model.device) for key, value in chosen.items()}
        domain = batch.pop("domain")
        domain = domain.where(domain == NO_DOMAIN, index)
        nll = head.nll(model(hidden_only=True, **batch), batch["labels"])
        total, tokens = total + float(nll.double().sum()), tokens + nll.numel()
        meter.add(list(model.decisions.values()), domain)
    loss = total / max(tokens, 1)
    return DomainLoss(domain=name, loss=loss, perplexity=math.exp(min(loss, 700)), tokens=tokens, rows=len(rows))
