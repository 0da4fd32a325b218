"""Which tokens go to which expert."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from dylora_moe.tuner import Decision

_TOP = 10
_MIN_COUNT = 3  # of a token by one expert: below, chance decides


class TokenMeter:
    """Counts the tokens that each expert served.

    Args:
        experts: Names, in the router's order.
        vocabulary: Tokens there are.
    """

    def __init__(self, experts: Sequence[str], vocabulary: int) -> None:
        self._experts = tuple(experts)
        self._counts = torch.zeros(vocabulary, len(self._experts), dtype=torch.float64)

    @torch.no_grad()
    def add(self, decisions: Collection[Decision], ids: Tensor, domain: Tensor) -> None:
        """Count one pass. Of several routers (one a layer) each counts an equal part of a token.

        Args:
            decisions: Of the pass.
            ids: (batch, tokens), int64, what was read.
            domain: (batch, tokens), int64, negative at padding.
        """
        real, flat = (domain >= 0).reshape(-1).cpu(), ids.reshape(-1).cpu()
        for decision in decisions:
            gates = decision.token_gates().double().cpu()
            self._counts.index_add_(0, flat[real], gates[real] / len(decisions))

    def report(self, text: Callable[[int], str]) -> dict[str, list[dict[str, Any]]]:
        """Expert -> the tokens that set it apart most, those that add most to its divergence from all experts.

        A token adds p(token | expert) * log2(p(token | expert) / p(token)), in bits, so that one is told that is both
        common with the expert and less so elsewhere. `count` is how many it served, `share` its part of all of them.

        Args:
            text: A token's id -> how it is written.
        """
        of_token, of_expert = self._counts.sum(1), self._counts.sum(0)
        total, found = of_token.sum(), dict[str, list[dict[str, Any]]]()
        for index, name in enumerate(self._experts):
            counts = self._counts[:, index]
            given, overall = counts / of_expert[index].clamp_min(1e-9), of_token / total.clamp_min(1e-9)
            bits = torch.where(counts >= _MIN_COUNT, given * (given / overall.clamp_min(1e-20)).log2(), 0.0)
            best = bits.topk(min(_TOP, len(bits)))
            found[name] = [
                {
                    "token": text(token),
                    "count": round(float(counts[token])),
                    "share": float(counts[token] / of_token[token]),
                }
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if value > 0
            ]
        return found
