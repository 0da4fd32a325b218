"""Loss of a model on rows of several domains, row by row or summed up, and how it routed them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dylora_moe import ranks
from dylora_moe.data.batching import NO_DOMAIN, Collator, TokenizedRow
from dylora_moe.evaluate.routing import RoutingMeter, RoutingReport
from dylora_moe.tuner import Decision, DyLoraModel
from dylora_moe.tuner.head import IGNORED, Head


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScore:
    """One row: the sum of its tokens' negative log-likelihood, in nats; its labelled tokens; those foretold."""

    nll: float
    tokens: int
    right: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainLoss:
    """Mean negative log-likelihood, in nats a labelled token, over a domain's rows.

    `accuracy` is the share of labelled tokens that were the likeliest, 0 to 1; None in records of older versions.
    """

    domain: str
    loss: float
    perplexity: float
    tokens: int
    rows: int
    accuracy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Losses of all domains, their plain mean, and the routing (None for a single LoRA or a forced expert)."""

    domains: tuple[DomainLoss, ...]
    mean_loss: float
    routing: RoutingReport | None


class Observer(Protocol):
    """Looks at each pass after it was made."""

    def __call__(self, decisions: Mapping[int | None, Decision], ids: Tensor, domain: Tensor) -> None:
        """See a pass.

        Args:
            decisions: Of the pass, by layer; None of a router that all layers share.
            ids: (batch, tokens), int64, what was read.
            domain: (batch, tokens), int64, index of each token's domain, negative at padding.
        """
        ...


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

    Processes of one run each take their share of the passes, and all get the whole evaluation.

    Args:
        model: Left in the mode it was in.
        head: Of the same base.
        rows: Domain -> rows; each row's `domain` is the index of its domain in this order.
        batch_size: Rows in one pass.
        pad_token_id: What fills short rows.
        before_batch: Called before each pass; what it raises ends the evaluation.
    """
    meter = RoutingMeter(model.expert_names, tuple(rows))
    scores = score_domains(
        model,
        head,
        rows,
        batch_size=batch_size,
        pad_token_id=pad_token_id,
        before_batch=before_batch,
        observe=lambda decisions, ids, domain: meter.add(list(decisions.values()), domain),
    )
    return evaluation_of(scores, meter.of_all_ranks().report())


def evaluation_of(scores: Mapping[str, Sequence[RowScore]], routing: RoutingReport | None) -> Evaluation:
    """Domain -> its rows' scores, and how they were routed -> an evaluation."""
    results = tuple(loss_of(domain, each) for domain, each in scores.items())
    mean = sum(result.loss for result in results) / len(results)
    return Evaluation(domains=results, mean_loss=mean, routing=routing)


def loss_of(domain: str, scores: Sequence[RowScore]) -> DomainLoss:
    """The rows of one domain together; each labelled token counts alike."""
    tokens = max(sum(score.tokens for score in scores), 1)
    loss = math.fsum(score.nll for score in scores) / tokens
    return DomainLoss(
        domain=domain,
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        tokens=sum(score.tokens for score in scores),
        rows=len(scores),
        accuracy=sum(score.right for score in scores) / tokens,
    )


@torch.no_grad()
def score_domains(
    model: DyLoraModel,
    head: Head,
    rows: Mapping[str, Sequence[TokenizedRow]],
    *,
    batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
    observe: Observer = lambda decisions, ids, domain: None,
) -> dict[str, list[RowScore]]:
    """Domain -> the score of each of its rows, in their order. Arguments as of `evaluate_domains`.

    Args:
        observe: Looks at each pass.
    """
    was_training = model.training
    model.eval()
    collate = Collator(pad_token_id=pad_token_id)
    found: dict[str, list[RowScore]] = {}
    try:
        for index, (name, domain_rows) in enumerate(rows.items()):
            placed: dict[int, RowScore] = {}
            for places in _own_batches(domain_rows, batch_size):
                before_batch()
                chosen = collate([domain_rows[place] for place in places])
                batch = {key: value.to(model.device) for key, value in chosen.items()}
                domain = batch.pop("domain")
                domain = domain.where(domain == NO_DOMAIN, index)
                hidden = model(hidden_only=True, token_mask=domain != NO_DOMAIN, **batch)
                observe(model.decisions, batch["input_ids"], domain)
                if places:
                    placed |= zip(places, _score_rows(head, hidden, batch["labels"]), strict=True)
            found[name] = _of_all_ranks(placed, len(domain_rows))
    finally:
        model.train(was_training)
    return found


def _batches(rows: Sequence[TokenizedRow], batch_size: int) -> Iterator[list[int]]:
    """Places of rows, those of like length together."""
    lengths = [len(row) for row in rows]
    ordered = sorted(range(len(rows)), key=lengths.__getitem__)
    return (ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size))


def _own_batches(rows: Sequence[TokenizedRow], batch_size: int) -> Iterator[list[int]]:
    """This process's share of the batches: each has as many, since all of them may be needed for a pass of any."""
    batches = list(_batches(rows, batch_size))
    for start in range(0, len(batches), ranks.count()):
        share = batches[start : start + ranks.count()]
        yield share[ranks.rank()] if ranks.rank() < len(share) else []


def _of_all_ranks(placed: Mapping[int, RowScore], rows: int) -> list[RowScore]:
    if ranks.count() > 1:
        scores = torch.zeros(rows, 3, dtype=torch.float64)
        for place, score in placed.items():
            scores[place] = torch.tensor([score.nll, score.tokens, score.right], dtype=torch.float64)
        found = enumerate(ranks.total(scores).tolist())
        placed = {
            place: RowScore(nll=nll, tokens=int(tokens), right=int(right)) for place, (nll, tokens, right) in found
        }
    return [placed[place] for place in range(rows)]


def _score_rows(head: Head, hidden: Tensor, labels: Tensor) -> list[RowScore]:
    nll, right = head.score(hidden, labels)
    row = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
    sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=nll.device)
    sums.index_add_(0, row, torch.stack([nll.double(), torch.ones_like(nll).double(), right.double()], dim=1))
    return [RowScore(nll=nll, tokens=int(tokens), right=int(right)) for nll, tokens, right in sums.tolist()]
