"""How tokens spread over experts: load, entropies, dead experts, and which domain goes where. Pure numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dylora_moe import ranks
from dylora_moe.tuner import Decision

# An expert is dead when its share of the load is under this part of the even share 1 / N.
DEAD_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingReport:
    """What a window of passes did. Units are tokens or documents, by granularity; shares sum to 1.

    Attributes:
        experts: Names, in the order of all lists here.
        domains: Names, in the order of the table's rows.
        table: Share of each domain's load that each expert took, one row a domain.
        load: Share of the whole load.
        load_entropy: Entropy of the load over log N: 1 even, 0 collapsed.
        decision_entropy: Mean entropy of a unit's probabilities over log N: 0 when the router is sure.
        effective_experts: exp of the load's entropy, 1 to N.
        max_violation: Highest load over the mean, minus 1 (arXiv 2408.15664): 0 when even, or when there is none.
        dead: Experts with less than 1 % of the even share.
        mutual_information: Between domain and expert, in bits; 0 when experts ignore domains.
        units: Decisions counted.
        unsure: Share of them that were near to no skill: the base answered, or dense collaboration. What the base
            answers is in no expert's load.
        domain_unsure: The same share of each domain's.
    """

    experts: tuple[str, ...]
    domains: tuple[str, ...]
    table: tuple[tuple[float, ...], ...]
    load: tuple[float, ...]
    load_entropy: float
    decision_entropy: float
    effective_experts: float
    max_violation: float
    dead: tuple[str, ...]
    mutual_information: float
    units: int
    unsure: float
    domain_unsure: tuple[float, ...]


class RoutingMeter:
    """Sums decisions of many passes by domain; `report` turns them into figures."""

    def __init__(self, experts: Sequence[str], domains: Sequence[str]) -> None:
        self.experts, self.domains = tuple(experts), tuple(domains)
        self.clear()

    def clear(self) -> None:
        """Forget everything seen."""
        self._load: Tensor | None = None
        self._entropy: Tensor | float = 0.0
        self._units: Tensor | None = None
        self._unsure: Tensor | None = None

    @torch.no_grad()
    def add(self, decisions: Sequence[Decision], domain: Tensor) -> None:
        """Count one pass. Several routers (one a layer) count alike.

        Args:
            decisions: Those of the pass.
            domain: (batch, tokens) index into the domains, negative at padding.
        """
        for decision in decisions:
            of_unit = _domain_of_unit(decision, domain.to(decision.probs.device).reshape(-1))
            if self._load is None:
                # Sums stay where the model is: reading them every pass would make a GPU wait.
                self._load = torch.zeros(
                    len(self.domains), len(self.experts), dtype=torch.float64, device=of_unit.device
                )
                self._units = self._load.new_zeros(len(self.domains), dtype=torch.long)
                self._unsure = torch.zeros_like(self._units)
            assert self._units is not None and self._unsure is not None
            if self._load.device != of_unit.device:  # sums that were kept on disk
                counts = (self._load, self._units, self._unsure)
                self._load, self._units, self._unsure = (count.to(of_unit.device) for count in counts)
            self._load.index_add_(0, of_unit, decision.load().double())
            entropy = -(decision.probs * decision.probs.clamp_min(1e-20).log()).sum(-1)
            self._entropy = self._entropy + (entropy * decision.valid).sum()
            self._units.index_add_(0, of_unit, decision.valid.long())
            if decision.sure is not None:
                self._unsure.index_add_(0, of_unit, (decision.valid & ~decision.sure).long())

    def sums(self) -> dict[str, Tensor]:
        """What was counted since the last `clear`, to go on from elsewhere; empty for nothing."""
        if self._load is None or self._units is None or self._unsure is None:
            return {}
        entropy = torch.as_tensor(self._entropy)
        return {"load": self._load, "entropy": entropy, "units": self._units, "unsure": self._unsure}

    def set_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Count on from what `sums` gave."""
        self.clear()
        if sums:
            self._load, self._entropy = sums["load"], sums["entropy"]
            self._units, self._unsure = sums["units"], sums["unsure"]

    def of_all_ranks(self) -> "RoutingMeter":
        """What the processes of a run have counted together; all of them ask."""
        if ranks.count() == 1:
            return self
        whole = RoutingMeter(self.experts, self.domains)
        whole.set_sums({name: ranks.total(value) for name, value in self.sums().items()})
        return whole

    def report(self) -> RoutingReport | None:
        """Figures of everything since the last `clear`; None when no router decided anything."""
        if self._load is None or self._units is None or self._unsure is None:
            return None
        units, unsure = self._units.cpu(), self._unsure.cpu()
        counts = self._load.cpu()
        joint = counts / counts.sum().clamp_min(1e-20)
        load, log_n = joint.sum(0), math.log(len(self.experts))
        per_domain = joint.sum(1, keepdim=True)
        entropy = float(-(load * load.clamp_min(1e-20).log()).sum())
        independent = (per_domain * load).clamp_min(1e-20)
        information = float((joint * (joint.clamp_min(1e-20) / independent).log2()).sum())
        return RoutingReport(
            experts=self.experts,
            domains=self.domains,
            table=tuple(tuple(row) for row in (joint / per_domain.clamp_min(1e-20)).tolist()),
            load=tuple(load.tolist()),
            load_entropy=entropy / log_n,
            decision_entropy=float(self._entropy) / max(int(units.sum()), 1) / log_n,
            effective_experts=math.exp(entropy),
            max_violation=max(0.0, float(load.max() * len(self.experts) - 1)),
            dead=tuple(
                name
                for name, share in zip(self.experts, load.tolist(), strict=True)
                if share < DEAD_SHARE / len(self.experts)
            ),
            mutual_information=max(0.0, information),
            units=int(units.sum()),
            unsure=int(unsure.sum()) / max(int(units.sum()), 1),
            domain_unsure=tuple((unsure / units.clamp_min(1)).tolist()),
        )


def routing_changes(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """How much routing changed from each measurement on validation rows to the next: 0 nothing, 1 everything.

    The change is the part of a domain's load that moved to other experts, mean over the domains: half the sum of the
    differences of its shares, their total variation distance.

    Args:
        reports: Records of `RoutingReport` with `step` and `split`, as training kept them.
    """
    seen = [report for report in reports if report["split"] == "validation"]
    changes = []
    for before, after in pairwise(seen):
        if (before["domains"], before["experts"]) == (after["domains"], after["experts"]):
            moved = [
                sum(abs(x - y) for x, y in zip(one, other, strict=True)) / 2
                for one, other in zip(before["table"], after["table"], strict=True)
            ]
            changes.append({"step": after["step"], "change": sum(moved) / len(moved)})
    return changes


def _domain_of_unit(decision: Decision, domain: Tensor) -> Tensor:
    """Domain of the tokens of each unit; 0 for a unit of padding, which has no load."""
    if decision.unit_of_token is not None:
        none = torch.full((decision.probs.shape[0],), -1, dtype=domain.dtype, device=domain.device)
        domain = none.scatter_reduce(0, decision.unit_of_token, domain, "amax")
    return domain.clamp_min(0)
