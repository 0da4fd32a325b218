"""One adapted Linear: PEFT's LoRA layer with N adapters, and a forward that follows the router's decision."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dylora_moe.tuner import kernels
from dylora_moe.tuner.config import Execution
from dylora_moe.tuner.routing import Decision, RoutingState

# Under sparse delegation the wide product does N / k times the work of the grouped one, but no sorting.
# The figures behind this bound are in docs/log.md (benchmarks/step.py).
_MAX_BOTTLENECK_EXPERTS = 1

# grouped_mm wants strides of whole 16 bytes: widths and ranks in steps of 8 satisfy it in 16- and 32-bit dtypes.
_STRIDE_STEP = 8


class RoutedLinear(LoraLinear):
    """A Linear of the base plus the low-rank products of the experts that its tokens are routed to.

    The adapters are PEFT's own (`lora_A[name].weight` of shape (r, in), `lora_B[name].weight` of (out, r)), so
    everything PEFT does with a LoRA layer still works. Their values live in two packed tensors, (N, r, in) and
    (N, out, r), of which the parameters are views: the executions read all experts without a copy.
    """

    routing: RoutingState
    layer_index: int
    expert_names: tuple[str, ...] = ()
    execution: Execution = "auto"

    def connect(self, routing: RoutingState, layer_index: int, names: tuple[str, ...], execution: Execution) -> None:
        """Say whose decisions to follow, and in which order the router numbers the experts."""
        self.routing, self.layer_index = routing, layer_index
        self.expert_names, self.execution = names, execution
        self._scales = torch.tensor([self.scaling.get(name, 0.0) for name in names])
        self._storage: tuple[Tensor, Tensor] | None = None

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Whether an expert's factors take gradients; nothing where the expert leaves this Linear alone."""
        for factors in (self.lora_A, self.lora_B):
            weight = self._weight(factors, name)
            if weight is not None:
                weight.requires_grad_(trainable)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the routed low-rank products. x: (batch, tokens, features_in) or (tokens, features_in)."""
        out = self.base_layer(x, *args, **kwargs)
        routing = self.routing
        if routing.disabled or self.disable_adapters or self.merged or not self.lora_A:
            return out
        if routing.forced is not None or len(self.expert_names) == 1:
            name = routing.forced or self.expert_names[0]
            return out + self._one(x, name) if name in self.lora_A else out
        decision = routing.decision_for(self.layer_index)
        if decision is None:
            raise RuntimeError(
                f"layer {self.layer_index} ran before its router decided; call the model through its decoder "
                "(model(...), model.generate(...)), not layer by layer."
            )
        delta = self._routed(self._drop(x).reshape(-1, x.shape[-1]), decision)
        return out + delta.view(*x.shape[:-1], delta.shape[-1]).to(out.dtype)

    def _one(self, x: Tensor, name: str) -> Tensor:
        a, b = self._weight(self.lora_A, name), self._weight(self.lora_B, name)
        assert a is not None and b is not None
        dropped = self.lora_dropout[name](x)
        # Scaled at the rank, as the other executions do: the same bits alone and among others.
        return F.linear(F.linear(dropped, a.to(x.dtype)) * self.scaling[name], b.to(x.dtype))

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout of the input, drawn once for all experts."""
        for name in self.expert_names:
            if name in self.lora_dropout:
                return self.lora_dropout[name](x)
        return x

    def _routed(self, x: Tensor, decision: Decision) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self._scales.device != x.device:
            self._scales = self._scales.to(x.device)
        lora_a, lora_b = self._factors()
        execution = self._choose(x, lora_b, decision)
        if execution == "reference":
            return kernels.reference(x, kernels.full_gates(decision), lora_a, lora_b, self._scales)
        if execution == "bottleneck":
            return kernels.bottleneck(x, kernels.full_gates(decision), lora_a, lora_b, self._scales)
        assert decision.dispatch is not None
        return kernels.grouped(x, decision.token_weights(), lora_a, lora_b, self._scales, decision.dispatch)

    def _choose(self, x: Tensor, lora_b: Tensor, decision: Decision) -> Execution:
        if self.execution == "reference" or x.dtype == torch.float64:
            return "reference"
        if decision.dispatch is None or self.execution == "bottleneck":
            return "bottleneck"
        if self.execution == "grouped":
            return "grouped"
        few = self.training and decision.num_experts <= _MAX_BOTTLENECK_EXPERTS
        odd = x.shape[-1] % _STRIDE_STEP or lora_b.shape[1] % _STRIDE_STEP
        return "bottleneck" if few or odd else "grouped"

    def _factors(self) -> tuple[Tensor, Tensor]:
        """All experts' A's, (N, r, in), and B's, (N, out, r), such that gradients reach the parameters.

        Experts of one rank share a packed storage; it is laid out at first use, and again when something (a move,
        a cast, loaded weights) gave the parameters other storage.
        """
        lora_a = [weight for name in self.expert_names if (weight := self._weight(self.lora_A, name)) is not None]
        lora_b = [weight for name in self.expert_names if (weight := self._weight(self.lora_B, name)) is not None]
        ranks = {a.shape[0] for a in lora_a}
        if len(lora_a) < len(self.expert_names) or len(ranks) > 1 or max(ranks) % _STRIDE_STEP:
            return self._padded(lora_a, lora_b)
        if self._storage is None or not (_is_shared(self._storage[0], lora_a) and _is_shared(self._storage[1], lora_b)):
            self._storage = _share_storage(lora_a), _share_storage(lora_b)
        return kernels.packed(self._storage[0], lora_a), kernels.packed(self._storage[1], lora_b)

    def _padded(self, lora_a: list[Tensor], lora_b: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Experts of different rank, zero-padded to one; zeros too for an expert that leaves this Linear alone."""
        rank = -(-max(a.shape[0] for a in lora_a) // _STRIDE_STEP) * _STRIDE_STEP
        blank_a, blank_b = lora_a[0].new_zeros(rank, lora_a[0].shape[1]), lora_b[0].new_zeros(lora_b[0].shape[0], rank)
        all_a, all_b = [], []
        for name in self.expert_names:
            a, b = self._weight(self.lora_A, name), self._weight(self.lora_B, name)
            all_a.append(blank_a if a is None else F.pad(a, (0, 0, 0, rank - a.shape[0])))
            all_b.append(blank_b if b is None else F.pad(b, (0, rank - b.shape[1])))
        return torch.stack(all_a), torch.stack(all_b)

    @staticmethod
    def _weight(factors: nn.ModuleDict, name: str) -> Tensor | None:
        return cast(nn.Linear, factors[name]).weight if name in factors else None


@torch.no_grad()
def _share_storage(params: list[Tensor]) -> Tensor:
    """Lay the values side by side and make the parameters views of them."""
    storage = torch.stack([param.data for param in params])
    for index, param in enumerate(params):
        param.data = storage[index]
    return storage


def _is_shared(storage: Tensor, params: list[Tensor]) -> bool:
    start, step = storage.data_ptr(), storage.stride(0) * storage.element_size()
    return all(p.data_ptr() == start + i * step and p.dtype == storage.dtype for i, p in enumerate(params))
