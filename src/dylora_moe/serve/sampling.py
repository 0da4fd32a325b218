"""Logits -> the next token of each row, drawn by the row's own numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How one row's token is chosen.

    Attributes:
        temperature: 0 for the likeliest.
        top_p: Share of the probability to draw from.
        chance: 0 to 1, of the row's own generator.
    """

    temperature: float
    top_p: float
    chance: float


def choose(logits: Float[Tensor, "rows vocabulary"], draws: Sequence[Draw]) -> list[int]:
    """A token for each row; a function of the row's logits and its draw alone."""
    tokens = logits.argmax(-1)
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _drawn(logits.index_select(0, rows), [draws[row] for row in drawn])
    return tokens.tolist()


def _drawn(logits: Float[Tensor, "rows vocabulary"], draws: Sequence[Draw]) -> Int[Tensor, " rows"]:
    columns = [[draw.temperature, draw.top_p, draw.chance] for draw in draws]
    temperature, top_p, chance = torch.tensor(columns, dtype=torch.float64, device=logits.device).unbind(1)
    # The highest at 0, so that a small temperature gives no infinity.
    probs = ((logits - logits.amax(1, keepdim=True)).double() / temperature[:, None]).softmax(1)
    if bool((top_p < 1).any()):
        ordered, order = probs.sort(dim=1, descending=True, stable=True)
        outside = ordered.cumsum(1) - ordered >= top_p[:, None]  # of those before it enough is there; never the first
        probs = probs.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), 0.0)
    # Summed in the vocabulary's order, which other rows of the batch cannot change as they may that of near-equals.
    sums = probs.cumsum(1)
    found = torch.searchsorted(sums, (chance * sums[:, -1])[:, None], right=True)[:, 0]
    last = probs.shape[1] - 1 - (probs.flip(1) > 0).int().argmax(1)
    return torch.minimum(found, last)


def log_probabilities(
    logits: Float[Tensor, "rows vocabulary"], tokens: Sequence[int], wanted: Sequence[int | None]
) -> list[tuple[float, tuple[tuple[int, float], ...]] | None]:
    """Of each row its token's log probability, and the likeliest tokens with theirs; None where not wanted.

    Those are of the model, before temperature and top_p.

    Args:
        logits: Of the next token.
        tokens: That were chosen.
        wanted: How many of the likeliest of each row; None for no log probabilities.
    """
    found: list[tuple[float, tuple[tuple[int, float], ...]] | None] = []
    for row, (token, number) in enumerate(zip(tokens, wanted, strict=True)):
        if number is None:
            found.append(None)
            continue
        logs = logits[row].log_softmax(-1)
        values, ids = logs.topk(min(number, logs.shape[0]))
        found.append((float(logs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))))
    return found
