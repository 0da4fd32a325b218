"""The single Linears that benchmarks/layer.py compares: stock PEFT LoRA, and ours by every execution."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from _measure import Forward, Timed
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dylora_moe.tuner.config import Execution, Granularity
from dylora_moe.tuner.routed import RoutedLinear
from dylora_moe.tuner.routing import Decision, RoutingState, make_dispatch

# Numbers of low-rank features above which the bottleneck is not timed: it is then several times slower than the base.
WIDEST_BOTTLENECK = 1024


@dataclass(slots=True, kw_only=True)
class TimedLayer(Timed):
    """Forward and backward of a layer, in seconds of one thread's CPU time or of the GPU."""

    device: torch.device

    def step(self) -> tuple[float, float, float]:
        """Forward, backward, and zero for the optimizer that a layer has not."""
        found = self._on_gpu() if self.device.type == "cuda" else self._on_cpu()
        self.optimizer.zero_grad(set_to_none=True)
        return (*found, 0.0)

    def _on_cpu(self) -> tuple[float, float]:
        start = time.process_time()
        loss = self.forwards[0]()
        between = time.process_time()
        loss.backward()
        return between - start, time.process_time() - between

    def _on_gpu(self) -> tuple[float, float]:
        start, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize(self.device)
        start.record()
        loss = self.forwards[0]()
        between.record()
        loss.backward()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(between) / 1000, between.elapsed_time(end) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One line of the table."""

    name: str
    execution: str
    granularity: Granularity | None
    """None where nothing is routed."""
    experts: int
    top_k: int
    timed: TimedLayer
    module: nn.Module
    given: tuple[Tensor, ...]
    """Input, gradient and what was decided: there anyway, not saved by the layer."""
    decision: Decision | None = None
    """What it follows; None where nothing is routed."""
    is_auto: bool = False
    """Whether this is what `auto` takes here."""

    def living(self) -> Iterable[Tensor]:
        """Tensors that are not counted as saved."""
        return chain(self.module.parameters(), self.module.buffers(), self.given)


class Bench:
    """Builds layers over one frozen weight and one batch."""

    def __init__(self, inputs: int, outputs: int, *, rows: int, tokens: int, rank: int, seed: int, device: str) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.device, self.rank = torch.device(device), rank
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._base = nn.Linear(inputs, outputs, bias=False, dtype=self.dtype).requires_grad_(False)
        self._base.weight.copy_(self._draw(outputs, inputs) * 0.02)
        self._base.to(self.device)
        self._x = self._draw(rows, tokens, inputs).to(self.device, self.dtype).requires_grad_()
        self._grad = self._draw(rows, tokens, outputs).to(self.device, self.dtype)

    def lora(self, name: str) -> Layer:
        """One stock PEFT LoRA."""
        config = self._config()
        module = LoraLinear(self._base, "default", config, r=self.rank, lora_alpha=2 * self.rank)
        return self._layer(module, name=name, execution="peft", granularity=None, experts=1, top_k=1)

    def alone(self) -> Layer:
        """One expert of ours, which needs no router."""
        module = self._routed(1, RoutingState(), "auto")
        return self._layer(module, name="N=1", execution="alone", granularity=None, experts=1, top_k=1)

    def routed(
        self, experts: int, top_k: int, granularity: Granularity, executions: Sequence[Execution]
    ) -> list[Layer]:
        """The same decision by every execution."""
        decision = self._decide(experts, top_k, granularity)
        state = RoutingState(decisions={None: decision})
        layers = []
        for execution in executions:
            if execution == "bottleneck" and experts * self.rank > WIDEST_BOTTLENECK:
                continue
            module = self._routed(experts, state, execution)
            assert module._choose(self._x, decision) == execution
            module.execution = "auto"
            is_auto = module._choose(self._x, decision) == execution
            module.execution = execution
            name = f"N={experts}, top {top_k}, {granularity}, {execution}"
            layer = self._layer(
                module,
                name=name,
                execution=execution,
                granularity=granularity,
                experts=experts,
                top_k=top_k,
                is_auto=is_auto,
                decision=decision,
            )
            layers.append(layer)
        return layers

    def gradient_off(self, layer: Layer) -> float | None:
        """Largest difference of a gradient to the reference loop in float64, by the largest value of that gradient.

        Of the input, the weights of the decision and all factors; None where nothing is routed.
        """
        if layer.decision is None:
            return None
        assert isinstance(layer.module, RoutedLinear)
        slow = deepcopy(layer.module).double()
        found = self._gradients(layer.module, layer.decision)
        expected = self._gradients(slow, layer.decision)
        off = [
            float((found[name].double() - wanted).abs().max() / wanted.abs().max())
            for name, wanted in expected.items()
            if bool(wanted.any()) or bool(found[name].any())  # an expert without a token has none by both
        ]
        return max(off)

    def _gradients(self, module: RoutedLinear, decision: Decision) -> dict[str, Tensor]:
        x = self._x.detach().to(next(module.base_layer.parameters()).dtype).requires_grad_()
        weights = decision.weights.detach().to(x).requires_grad_()
        of_token = weights if decision.unit_of_token is None else weights[decision.unit_of_token]
        assert decision.dispatch is not None
        slots = of_token.reshape(-1).index_select(0, decision.dispatch.slot_order)
        state, module.routing = module.routing, RoutingState()
        module.routing.decisions[None] = replace(decision, weights=weights, slot_weights=slots)
        (module(x) * self._grad.to(x)).sum().backward()
        module.routing = state
        assert x.grad is not None and weights.grad is not None
        found = {"x": x.grad, "weights": weights.grad}
        for name in module.expert_names:
            for factor, (parameter, place) in module.trained_parts(name).items():
                assert parameter.grad is not None
                found[f"{factor} of {name}"] = parameter.grad if place is None else parameter.grad[place]
        module.zero_grad(set_to_none=True)
        return found

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random)

    def _config(self) -> LoraConfig:
        return LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.0)

    def _routed(self, experts: int, state: RoutingState, execution: Execution) -> RoutedLinear:
        names = tuple(f"expert_{index}" for index in range(experts))
        config = self._config()
        module = RoutedLinear(self._base, names[0], config, r=self.rank, lora_alpha=2 * self.rank)
        for name in names[1:]:
            module.update_layer(name, self.rank, lora_alpha=2 * self.rank, config=config)
        module.connect(state, 0, names=names, frozen=frozenset(), execution=execution)
        return module

    def _decide(self, experts: int, top_k: int, granularity: Granularity) -> Decision:
        rows, tokens = self._x.shape[:2]
        units = rows if granularity == "sequence" else rows * tokens
        logits = self._draw(units, experts)
        top = logits.topk(top_k, dim=1)
        unit_of_token = torch.arange(rows).repeat_interleave(tokens) if granularity == "sequence" else None
        token_experts = top.indices if unit_of_token is None else top.indices[unit_of_token]
        weights = top.values.softmax(1)
        token_weights = weights if unit_of_token is None else weights[unit_of_token]
        plan = make_dispatch(token_experts.to(self.device), experts)
        slots = token_weights.to(self.device).reshape(-1).index_select(0, plan.slot_order)
        return Decision(
            logits=logits.to(self.device),
            probs=logits.softmax(1).to(self.device),
            experts=top.indices.to(self.device),
            weights=weights.to(self.device).requires_grad_(),
            valid=torch.ones(units, dtype=torch.bool, device=self.device),
            unit_of_token=None if unit_of_token is None else unit_of_token.to(self.device),
            row_of_unit=torch.arange(units, device=self.device) // (units // rows),
            dispatch=plan,
            slot_weights=slots.requires_grad_(),
        )

    def _layer(self, module: nn.Module, *, decision: Decision | None = None, **fields: Any) -> Layer:
        module.to(self.device, self.dtype).train()
        for key, parameter in module.named_parameters():
            if "_B" in key:
                # PEFT's zeros would make the gradient of A vanish.
                nn.init.normal_(parameter, std=0.02)
        given = [self._x, self._grad]
        if decision is not None:
            assert decision.slot_weights is not None and decision.dispatch is not None
            given += [decision.weights, decision.slot_weights, *(getattr(decision, n) for n in ("experts", "probs"))]
            given += [getattr(decision.dispatch, n) for n in decision.dispatch.__slots__]
        trained = [p for p in module.parameters() if p.requires_grad]
        leaves = [*trained, *(tensor for tensor in given if tensor.requires_grad)]

        def forward() -> Tensor:
            return (module(self._x) * self._grad).sum()

        timed = TimedLayer(forwards=[forward], optimizer=torch.optim.SGD(leaves, lr=0.0), device=self.device)
        return Layer(module=module, timed=timed, given=tuple(given), decision=decision, **fields)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not getattr(func, "is_view", False)
        return func(*args, **kwargs or {})


def operations(forward: Forward) -> tuple[int, int]:
    """What forward and backward ask torch for, views left out, and the Triton kernels that they launch."""
    with _Counter() as counter, _launches() as launched:
        forward().backward()
    return counter.count, len(launched)


@contextmanager
def _launches() -> Iterator[list[str]]:
    module: Any = sys.modules["dylora_moe.tuner.kernels.triton"]
    launch: Callable[..., None] = module._launch
    launched: list[str] = []

    def noted(name: str, *args: Any, **meta: Any) -> None:
        launched.append(name)
        launch(name, *args, **meta)

    module._launch = noted
    try:
        yield launched
    finally:
        module._launch = launch
