"""What training steps add up: rows and tokens of each domain, and routing since the last line of metrics.

Each process counts what it computes; figures are of all of them together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dylora_moe import ranks
from dylora_moe.data.batching import NO_DOMAIN
from dylora_moe.evaluate.routing import RoutingMeter, RoutingReport
from dylora_moe.train.memory import available_memory, peak_memory, resident_memory
from dylora_moe.train.state import Saved
from dylora_moe.tuner import AuxiliaryLosses, Decision


class StepFigures:
    """Counts passes, and turns the counts into figures.

    Args:
        experts: Names, in the router's order.
        domains: Names; a token's domain is an index into them.
        seconds: Gives the seconds spent in steps since it was last called.
        record_routing: Takes how tokens were routed since last time.

    Attributes:
        rows: Seen of each domain since the start, by this process.
        tokens: Seen of each domain since the start, by this process.
    """

    def __init__(
        self,
        experts: Sequence[str],
        domains: Sequence[str],
        *,
        seconds: Callable[[], float],
        record_routing: Callable[[RoutingReport], None],
    ) -> None:
        self._meter = RoutingMeter(experts, domains)
        self._seconds, self._record_routing = seconds, record_routing
        # Sums stay where the model is: reading them every pass would make a GPU wait.
        self.rows, self.tokens = (torch.zeros(len(domains), dtype=torch.long) for _ in range(2))
        self._tokens_told = 0
        self._auxiliary: Tensor | None = None
        self._experts, self._domains = tuple(experts), tuple(domains)

    def add(
        self,
        domain: Tensor,
        position_ids: Tensor | None,
        decisions: Mapping[int | None, Decision],
        auxiliary: AuxiliaryLosses,
        weight: Tensor | float = 1.0,
    ) -> None:
        """Count one pass.

        Args:
            domain: (batch, tokens), int64, `NO_DOMAIN` at padding.
            position_ids: (batch, tokens), int64, where documents are packed.
            decisions: Of the pass.
            auxiliary: Losses of the pass.
            weight: Its share of the batch.
        """
        self._meter.add(list(decisions.values()), domain)
        member = F.one_hot(domain - NO_DOMAIN, 1 + len(self.rows))[..., 1:]
        first = member[:, 0] if position_ids is None else member * (position_ids == 0)[..., None]
        self.rows = self.rows.to(domain.device) + first.reshape(-1, len(self.rows)).sum(0)
        self.tokens = self.tokens.to(domain.device) + member.sum((0, 1))
        losses = torch.stack([auxiliary.balance.detach(), auxiliary.z.detach()])
        # Alone they are as they are: a factor that is divided by again costs a bit.
        self._auxiliary = losses if ranks.count() == 1 else torch.cat([losses, losses.new_ones(1)]) * weight

    def take(self) -> dict[str, float]:
        """The figures since the last call."""
        tokens = int(ranks.total(self.tokens).sum())
        figures: dict[str, float] = {
            "tokens": tokens,
            "tokens_per_second": (tokens - self._tokens_told) / max(self._seconds(), 1e-9),
            **self._memory(),
        }
        self._tokens_told = tokens
        if self._auxiliary is not None:
            losses = self._auxiliary
            if ranks.count() > 1:
                losses = ranks.total(losses)
                losses = losses[:2] / losses[2]
            figures |= {"balance_loss": float(losses[0]), "z_loss": float(losses[1])}
        report = self._meter.of_all_ranks().report()
        if report is not None:
            figures |= {"router_entropy": report.decision_entropy, "load_entropy": report.load_entropy}
            figures |= {"dead_experts": len(report.dead), "max_violation": report.max_violation}
            figures |= {f"load_{name}": share for name, share in zip(report.experts, report.load, strict=True)}
            self._record_routing(report)
            self._meter.clear()
        return figures

    def trained(self) -> list[tuple[str, int, int]]:
        """Domain, rows and tokens that all processes have seen of it since the start."""
        rows, tokens = ranks.total(self.rows).tolist(), ranks.total(self.tokens).tolist()
        return list(zip(self._domains, rows, tokens, strict=True))

    def _memory(self) -> dict[str, float]:
        """Of a GPU the most since the start; else resident of this process now. And its share of what can be had."""
        device = self.rows.device
        used = peak_memory(device) if device.type == "cuda" else resident_memory()
        return {"memory_gb": used / 1e9, "memory_share": used / available_memory(device)}

    def sums(self) -> Saved:
        """All that was counted, to go on from."""
        tensors = {"rows": self.rows, "tokens": self.tokens}
        tensors |= {f"routing.{name}": value for name, value in self._meter.sums().items()}
        return Saved(tensors={name: value.clone() for name, value in tensors.items()}, record=self._tokens_told)

    def set_sums(self, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Count on from what `sums` gave."""
        self.rows, self.tokens, self._tokens_told = tensors["rows"].clone(), tensors["tokens"].clone(), record
        prefix = "routing."
        self._meter.set_sums(
            {name.removeprefix(prefix): value.clone() for name, value in tensors.items() if name.startswith(prefix)}
        )
