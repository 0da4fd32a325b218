"""The autograd Function of all executions that add routed products to a Linear's output where it lies.

It keeps the input and the products of the rank's size, and changes the frozen Linear's own output, which nobody's
backward needs. What computes the products is given, as a pair of plain functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dylora_moe.tuner.kernels.dtypes import as_is
from dylora_moe.tuner.routing import Dispatch

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, weights, A and B; None where not needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """How one execution computes, without a graph.

    Attributes:
        add: (out, x, weights, A, B, scales, plan) -> the products of the rank's size, before gates; changes `out`.
        gradients: (needed, grad, plan, x, weights, A, B, scales, base, raw) -> gradients; `needed` says which, `grad`
            is that of `out`, `raw` is what `add` gave.
    """

    add: Callable[..., Tensor]
    gradients: Callable[..., Gradients]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverSlots(Products):
    """An execution over the sorted slots of a `Dispatch`."""

    def __call__(
        self,
        out: Float[Tensor, "*batch features_out"],
        x: Float[Tensor, "tokens features_in"],
        slot_weights: Float[Tensor, " slots"],
        lora_a: Float[Tensor, "experts rank features_in"],
        lora_b: Float[Tensor, "experts features_out rank"],
        scales: Float[Tensor, " experts"],
        plan: Dispatch,
        base: Float[Tensor, "features_out features_in"] | None = None,
    ) -> Float[Tensor, "*batch features_out"]:
        """Adds the routed products to `out` in place; `base` as `add_in_place` has it."""
        return add_in_place(self, out, x, slot_weights, lora_a, lora_b, scales, plan, base)


def add_in_place(
    products: Products,
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scales: Tensor,
    plan: Any,
    base: Tensor | None,
) -> Tensor:
    """Adds routed products to `out` and gives it, with a graph.

    Args:
        products: What computes them.
        out: (..., features_out).
        x: Input, in the shape that the execution wants.
        weights: Of what the plan lists.
        lora_a: (experts, rank, features_in).
        lora_b: (experts, features_out, rank).
        scales: (experts,), float32.
        plan: Who computes what, as the execution knows it.
        base: The frozen weight that made `out` from `x` without a graph, for the gradient of `x`; None when `out` has
            a graph of its own.
    """
    return _InPlace.apply(out, x, weights, lora_a, lora_b, scales, base, plan, products)  # type: ignore[return-value]


class _InPlace(torch.autograd.Function):
    """(out (..., o), x, weights, A (N, r, i), B (N, o, r), scales (N,), base, plan, products) -> out."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        weights: Tensor,
        a: Tensor,
        b: Tensor,
        scales: Tensor,
        base: Tensor | None,
        plan: Any,
        products: Products,
    ) -> Tensor:
        ctx.mark_dirty(out)
        ctx.plan, ctx.products = plan, products
        with as_is(x):
            raw = products.add(out, x, weights, a, b, scales, plan)
        ctx.save_for_backward(x, weights, a, b, scales, base, raw)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is an error
        with as_is(saved[0]):
            found = ctx.products.gradients(ctx.needs_input_grad[1:], grad, ctx.plan, *saved)
        return grad, *found, None, None, None, None
