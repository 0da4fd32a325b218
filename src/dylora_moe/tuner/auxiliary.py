"""Losses on the routing itself, beside the loss of the language model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dylora_moe.tuner.routing import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryLosses:
    """Losses on the routing of the last pass, means over routers; 0-dim tensors with gradients."""

    balance: Tensor
    z: Tensor


class LoadWindow:
    """The load of each expert, summed over the passes of one optimizer step, for each router.

    Source: the balance loss over the whole step instead of each micro-batch, arXiv 2501.11873.
    """

    def __init__(self) -> None:
        self._sums: dict[int | None, Tensor] = {}

    def add(self, key: int | None, load: Float[Tensor, " experts"]) -> Float[Tensor, " experts"]:
        """Add the load of one pass; returns the share of each expert in the window so far."""
        total = load + self._sums[key] if key in self._sums else load
        self._sums[key] = total
        return total / total.sum().clamp_min(1e-9)

    def clear(self) -> None:
        """Start a new optimizer step."""
        self._sums.clear()


class BatchLoad:
    """The load of one batch that is computed in parts, found before any of their losses and added to the window once.

    With it the parts' balance losses, weighted by `weigh`, sum to that of the whole batch.

    Args:
        window: Of the optimizer step.
        total: Sums a tensor over processes that compute other parts of the batch.
    """

    def __init__(self, window: LoadWindow, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self._window, self._total = window, total
        self._loads: dict[int | None, Tensor] = {}
        self._shares: dict[int | None, Tensor] = {}
        self._units: Tensor | None = None

    def count(self, decisions: Mapping[int | None, Decision]) -> None:
        """Add a part, before any loss is asked for."""
        for key, decision in decisions.items():
            load = decision.load().sum(0)
            self._loads[key] = load + self._loads[key] if key in self._loads else load
        if decisions:
            units = _units(decisions)
            self._units = units if self._units is None else self._units + units

    def close(self) -> "BatchLoad":
        """All parts are counted: add them to the window."""
        if self._units is None:
            return self
        counted = torch.stack([*self._loads.values()])
        # In one tensor, since each sum over processes takes its time; float32 counts units exactly up to 2^24.
        units = self._units.to(counted.dtype).expand(len(counted), 1)
        summed = self._total(torch.cat([counted, units], 1))
        self._units = summed[0, -1]
        for key, load in zip(self._loads, summed[:, :-1], strict=True):
            self._shares[key] = self._window.add(key, load)
        return self

    def add(self, key: int | None, load: Float[Tensor, " experts"]) -> Float[Tensor, " experts"]:
        """The share of each expert in the window with all of the batch in it; the load given is part of that."""
        return self._shares[key]

    def weigh(self, decisions: Mapping[int | None, Decision]) -> Float[Tensor, ""] | float:
        """The share of the batch's units that are in this part."""
        return _units(decisions) / self._units if self._units is not None else 1.0


def _units(decisions: Mapping[int | None, Decision]) -> Tensor:
    """Units of a pass, padding left out; every router decides for the same."""
    return next(iter(decisions.values())).valid.sum()


def auxiliary_losses(
    decisions: Mapping[int | None, Decision], window: LoadWindow | BatchLoad, device: torch.device
) -> AuxiliaryLosses:
    """Means over routers; zeros where there are none."""
    balance, z = [], []
    for key, decision in decisions.items():
        share = window.add(key, decision.load().sum(0))
        balance.append(balance_loss(share, decision.probs, decision.valid))
        z.append(z_loss(decision.logits, decision.valid))
    if not balance:
        zero = torch.zeros((), device=device)
        return AuxiliaryLosses(balance=zero, z=zero)
    return AuxiliaryLosses(balance=torch.stack(balance).mean(), z=torch.stack(z).mean())


def balance_loss(
    load_fraction: Float[Tensor, " experts"],
    probs: Float[Tensor, "units experts"],
    valid: Bool[Tensor, " units"],
) -> Float[Tensor, ""]:
    """N * sum over experts of f_e * P_e; 1 when balanced, N when collapsed.

    f, the share of the load, carries no gradient and may cover more micro-batches than `probs` does.
    Source: Switch Transformer, arXiv 2101.03961, eq. 4; f over the whole step: arXiv 2501.11873.
    """
    mean_probs = (probs * valid[:, None]).sum(0) / valid.sum().clamp_min(1)
    return probs.shape[1] * (load_fraction.detach() * mean_probs).sum()


def z_loss(logits: Float[Tensor, "units experts"], valid: Bool[Tensor, " units"]) -> Float[Tensor, ""]:
    """Mean squared log-sum-exp of the logits. Source: ST-MoE, arXiv 2202.08906, eq. 5."""
    squared = logits.logsumexp(-1).pow(2)
    return (squared * valid).sum() / valid.sum().clamp_min(1)
