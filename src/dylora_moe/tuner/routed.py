"""One adapted Linear: PEFT's LoRA layer with N adapters, and a forward that follows the router's decision."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dylora_moe.tuner import kernels
from dylora_moe.tuner.config import Execution
from dylora_moe.tuner.packed import PackedFactor
from dylora_moe.tuner.routing import Decision, RoutingState, Run, runs_of_one

# grouped_mm wants strides of whole 16 bytes: widths and ranks in steps of 8 satisfy it in 16- and 32-bit dtypes.
_STRIDE_STEP = 8

# Tokens from which gathering the factors of a row (r of them) is cheaper than sorting its tokens, measured at r = 16. A
# constant: the bits of an old expert's output must not change with the experts there are.
_LONG_ROW = 64

# Of each expert its name and what the modules of its A and B hold; None where it leaves a Linear alone.
_Present = tuple[tuple[str, dict[str, Any], dict[str, Any]] | None, ...]


class RoutedLinear(LoraLinear):
    """A Linear of the base plus the low-rank products of the experts that its tokens are routed to.

    The adapters are PEFT's own (`lora_A[name].weight` of shape (r, in), `lora_B[name].weight` of (out, r)), so
    everything PEFT does with a LoRA layer still works. Two experts or more of one rank lie packed: their weights are
    views, and what trains are the runs of `packed_A` and `packed_B`.
    """

    routing: RoutingState
    layer_index: int
    expert_names: tuple[str, ...] = ()
    frozen_names: frozenset[str] = frozenset()
    execution: Execution = "auto"
    _present: _Present = ()
    """Empty until it is asked for, and once PEFT changed what there is."""

    def connect(
        self,
        routing: RoutingState,
        layer_index: int,
        *,
        names: tuple[str, ...],
        frozen: frozenset[str],
        execution: Execution,
    ) -> None:
        """Say whose decisions to follow, in which order the router numbers the experts, and which of them train."""
        self.routing, self.layer_index, self.execution = routing, layer_index, execution
        self.expert_names, self.frozen_names = names, frozen
        self._present = ()
        self._scaled_by = self._current_scales()
        self._scales = torch.tensor(self._scaled_by)
        if not isinstance(getattr(self, "packed_A", None), PackedFactor):
            self.packed_A, self.packed_B = PackedFactor(), PackedFactor()
        self._lay_out()

    def trains(self, name: str) -> bool:
        """Whether both factors of an expert here take gradients, as they are or packed."""
        return len(self.trained_parts(name)) == 2

    def trained_parts(self, name: str) -> dict[str, tuple[nn.Parameter, int | None]]:
        """Factor (`A`, `B`) -> the parameter by which an expert trains here, and its place there, None for all of it.

        Empty where it is frozen, or leaves this Linear alone.
        """
        found: dict[str, tuple[nn.Parameter, int | None]] = {}
        for factor, packed, factors in (("A", self.packed_A, self.lora_A), ("B", self.packed_B, self.lora_B)):
            if name not in factors:
                continue
            weight = cast(nn.Parameter, cast(nn.Linear, factors[name]).weight)
            if (run := packed.run_of(self.expert_names.index(name))) is not None:
                found[factor] = run
            elif weight.requires_grad:
                found[factor] = weight, None
        return found

    def num_parameters(self, name: str) -> int:
        """Size of an expert's two factors here."""
        return sum(cast(nn.Linear, factors[name]).weight.numel() for factors in (self.lora_A, self.lora_B))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the routed low-rank products. x: (batch, tokens, features_in) or (tokens, features_in)."""
        # A token of generation visits 200 Linears, each anew to the caches of the CPU: nn.Module's way to an attribute
        # and PEFT's properties would take as long there as the products.
        own = self.__dict__
        routing: RoutingState = own["routing"]
        if (
            routing.disabled
            or own["_disable_adapters"]
            or own["merged_adapters"]
            or not own["_modules"]["lora_A"]._modules
        ):
            return self.base_layer(x, *args, **kwargs)
        if routing.forced is not None or (len(own["expert_names"]) == 1 and routing.rows is None):
            name = routing.forced or self.expert_names[0]
            if self.execution == "auto" and x.numel() == x.shape[-1] and not torch.is_grad_enabled():
                runs = runs_of_one(self.expert_names.index(name), x.device)
                return self._few(x, runs, *args, **kwargs)
            if self.execution == "rowwise" and name in self.lora_A and x.dim() == 3 and not torch.is_grad_enabled():
                return self._alone(x, name, *args, **kwargs)
            out = self.base_layer(x, *args, **kwargs)
            return out + self._one(x, name) if name in self.lora_A else out
        decision = routing.decision_for(self.layer_index)
        if decision is None:
            raise RuntimeError(
                f"layer {self.layer_index} ran before its router decided; call the model through its decoder "
                "(model(...), model.generate(...)), not layer by layer."
            )
        if decision.few is not None and self.execution == "auto" and not torch.is_grad_enabled():
            return self._few(x, decision.few, *args, **kwargs)
        execution = self._choose(x, decision)
        if execution in ("rowwise", "grouped", "triton"):
            return self._in_place(x, decision, execution, *args, **kwargs)
        inputs, (lora_a, lora_b) = self._inputs(x).flatten(0, -2), self._factors()
        compute = kernels.reference if execution == "reference" else kernels.bottleneck
        delta = compute(inputs, decision.token_gates(), lora_a, lora_b, self._scales_on(x.device))
        out = self.base_layer(x, *args, **kwargs)
        return out + delta.view(out.shape).to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoutedLinear":
        super()._apply(fn, recurse)  # moves or casts each tensor by itself
        if self.expert_names:
            self._lay_out()
        return self

    def _alone(self, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """One expert for all rows by the products that it has among others, so that a new one changes no bit.

        In 16 bits `_one` rounds once more.
        """
        inputs, (a, b) = self._inputs(x), self._factors_of(name)
        out = self.base_layer(x, *args, **kwargs)
        if out._is_view():
            out = out.clone()
        weights = torch.ones(x.shape[0], 1, device=x.device)
        experts = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device)
        scales = torch.tensor([self.scaling[name]], device=x.device)
        return kernels.rowwise(out, inputs, weights, experts, a[None], b[None], scales)

    def _few(self, x: Tensor, runs: Sequence[Run], *args: Any, **kwargs: Any) -> Tensor:
        """Few tokens without gradients, as the host knows who serves them."""
        own = self.__dict__
        modules, scaling = own["_modules"], own["scaling"]
        present: _Present = own["_present"] or self._find_present()
        parts: list[kernels.Part] = []
        for run in runs:
            factors = present[run.expert]
            if factors is not None:
                name, a, b = factors
                parts.append((run, a["_parameters"]["weight"], b["_parameters"]["weight"], scaling[name]))
        inputs = self._inputs(x) if own["training"] or torch.is_autocast_enabled(x.device.type) else x
        return kernels.few(modules["base_layer"](x, *args, **kwargs), inputs, parts)

    def _find_present(self) -> "_Present":
        lora_a, lora_b = self.lora_A, self.lora_B
        found = [
            (name, lora_a[name].__dict__, lora_b[name].__dict__) if name in lora_a else None
            for name in self.expert_names
        ]
        self._present = tuple(found)
        return self._present

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT does: new factors for one adapter."""
        self._present = ()
        super().update_layer(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT does: one adapter less."""
        self._present = ()
        super().delete_adapter(adapter_name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._present = ()  # a copy has modules of its own

    def _factors_of(self, name: str) -> tuple[Tensor, Tensor]:
        if self._is_packed:
            index = self.expert_names.index(name)
            lora_a, lora_b = self._factors()
            return lora_a[index], lora_b[index]
        return cast(nn.Linear, self.lora_A[name]).weight, cast(nn.Linear, self.lora_B[name]).weight

    def _one(self, x: Tensor, name: str) -> Tensor:
        a, b = self._factors_of(name)
        dropped = self.lora_dropout[name](x)
        # Scaled at the rank, as the other executions do: the same bits alone and among others.
        return F.linear(F.linear(dropped, a.to(x.dtype)) * self.scaling[name], b.to(x.dtype))

    def _inputs(self, x: Tensor) -> Tensor:
        """What the low-rank products read: dropout drawn once for all experts, autocast applied."""
        if self.training:
            for name in self.expert_names:
                if name in self.lora_dropout:
                    x = self.lora_dropout[name](x)
                    break
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

    def _in_place(self, x: Tensor, decision: Decision, execution: Execution, *args: Any, **kwargs: Any) -> Tensor:
        """Base output, to which the routed products are added where it lies."""
        inputs, (lora_a, lora_b), scales = self._inputs(x), self._factors(), self._scales_on(x.device)
        base = self._plain_base(x) if inputs is x else None
        with torch.no_grad() if base is not None else nullcontext():
            out = self.base_layer(x, *args, **kwargs)
        if out._is_view():
            out = out.clone()  # autograd keeps track of a view that is changed in place less well
        if execution == "rowwise":
            assert decision.experts is not None
            return kernels.rowwise(out, inputs, decision.weights, decision.experts, lora_a, lora_b, scales, base)
        assert decision.dispatch is not None and decision.slot_weights is not None
        slots, plan = decision.slot_weights, decision.dispatch
        compute = kernels.triton if execution == "triton" else kernels.grouped
        return compute(out, inputs.flatten(0, -2), slots, lora_a, lora_b, scales, plan, base)

    def _plain_base(self, x: Tensor) -> Tensor | None:
        """The base's weight, if all that its layer does is to multiply by it; then the experts' backward does too."""
        layer = self.base_layer
        hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or hasattr(layer, "_hf_hook")
        if type(layer) is not nn.Linear or hooked:
            return None
        weight = layer.weight
        is_plain = type(weight) is nn.Parameter and weight.dtype == x.dtype and not weight.requires_grad
        return weight if is_plain else None

    def _current_scales(self) -> list[float]:
        return [self.scaling.get(name, 0.0) for name in self.expert_names]

    def _scales_on(self, device: torch.device) -> Tensor:
        """All experts' scales, made anew only where PEFT changed one: on a GPU that copies from the host."""
        if self._scaled_by != (scales := self._current_scales()):
            self._scaled_by, self._scales = scales, torch.tensor(scales)
        if self._scales.device != device:
            self._scales = self._scales.to(device)
        return self._scales

    def _choose(self, x: Tensor, decision: Decision) -> Execution:
        if self.execution == "triton":
            kernels.require_triton(x, self._most_rank)
        if self.execution == "reference" or x.dtype == torch.float64:
            return "reference"
        if decision.experts is None or self.execution == "bottleneck":
            return "bottleneck"
        one_decision_a_row = x.dim() == 3 and decision.experts.shape[0] == x.shape[0]
        if one_decision_a_row and (
            self.execution == "rowwise" or (self.execution == "auto" and x.shape[1] >= _LONG_ROW)
        ):
            return "rowwise"
        if self.execution == "triton" or (self.execution == "auto" and kernels.takes_triton(x, self._most_rank)):
            return "triton"
        odd = any((width or 0) % _STRIDE_STEP for width in (self.in_features, self.out_features))
        return "bottleneck" if odd and self.execution != "grouped" else "grouped"

    def _weights(self, factors: nn.ModuleDict) -> list[nn.Parameter]:
        """The present experts' weights in the router's order."""
        # Straight from the dicts: nn.Module's attribute access, 64 times a Linear, shows in the time of a step.
        linears = factors._modules
        return [linears[name]._parameters["weight"] for name in self.expert_names if name in linears]  # type: ignore[union-attr,misc]

    def _lay_out(self) -> None:
        """Pack the experts where they are alike, and set what trains."""
        lora_a, lora_b = self._weights(self.lora_A), self._weights(self.lora_B)
        trainable = [name not in self.frozen_names for name in self.expert_names if name in self.lora_A]
        ranks = {weight.shape[0] for weight in lora_a}
        self._most_rank = max(ranks, default=0)
        packable = len(lora_a) == len(self.expert_names) > 1 and len(ranks) == 1 and not max(ranks) % _STRIDE_STEP
        for factor, weights in ((self.packed_A, lora_a), (self.packed_B, lora_b)):
            if packable:
                factor.lay_out(weights, trainable)
                continue
            factor.clear()
            for weight, trains in zip(weights, trainable, strict=True):
                weight.requires_grad_(trains)
        self._is_packed = packable

    def follow_moved_weights(self) -> None:
        """Take the memory that an engine gave to what trains, where that is all experts, as theirs."""
        if self._is_packed:
            self.packed_A.follow(self._weights(self.lora_A))
            self.packed_B.follow(self._weights(self.lora_B))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """All experts' A's, (N, rank, in), and B's, (N, out, rank), such that gradients reach what trains."""
        lora_a, lora_b = self._weights(self.lora_A), self._weights(self.lora_B)
        if not self._is_packed:
            return self._padded(lora_a, lora_b)
        if not (self.packed_A.holds(lora_a) and self.packed_B.holds(lora_b)):
            self._lay_out()
        return self.packed_A(), self.packed_B()

    def _padded(self, lora_a: list[nn.Parameter], lora_b: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Experts of different rank, zero-padded to one; zeros too for an expert that leaves this Linear alone."""
        rank = -(-max(a.shape[0] for a in lora_a) // _STRIDE_STEP) * _STRIDE_STEP
        blank_a, blank_b = lora_a[0].new_zeros(rank, lora_a[0].shape[1]), lora_b[0].new_zeros(lora_b[0].shape[0], rank)
        present = iter(zip(lora_a, lora_b, strict=True))
        all_a, all_b = [], []
        for name in self.expert_names:
            a, b = next(present) if name in self.lora_A else (None, None)
            all_a.append(blank_a if a is None else F.pad(a, (0, 0, 0, rank - a.shape[0])))
            all_b.append(blank_b if b is None else F.pad(b, (0, rank - b.shape[1])))
        return torch.stack(all_a), torch.stack(all_b)
