"""All experts as one product of width N * r, gated at the rank."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dylora_moe.tuner.kernels.dtypes import as_is


def bottleneck(
    x: Float[Tensor, "tokens features_in"],
    gates: Float[Tensor, "tokens experts"],
    lora_a: Float[Tensor, "experts rank features_in"],
    lora_b: Float[Tensor, "experts features_out rank"],
    scales: Float[Tensor, " experts"],
) -> Float[Tensor, "tokens features_out"]:
    """Every expert on every token in two GEMMs; for dense collaboration."""
    return _Bottleneck.apply(x, gates, lora_a, lora_b, scales)  # type: ignore[return-value]


class _Bottleneck(torch.autograd.Function):
    """(x, gates, A (N, r, i), B (N, o, r), scales (N,)) -> delta (n, o)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, gates, a, b, scales)
        with as_is(x):
            gated = _gate_rank(x @ _rows(a, x).t(), gates, scales, a.shape)
            return gated @ _columns(b, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is an error
        with as_is(saved[0]):
            return *_gradients(ctx.needs_input_grad, grad, *saved), None


def _gradients(
    needed: Sequence[bool], grad: Tensor, x: Tensor, gates: Tensor, a: Tensor, b: Tensor, scales: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gates, A and B; None where not needed."""
    num_experts, rank, _ = a.shape
    grad, flat_a, flat_b = grad.to(x.dtype), _rows(a, x), _columns(b, x)
    raw = x @ flat_a.t()
    grad_gated = grad @ flat_b.t()
    grad_gates = grad_a = grad_b = None
    if needed[1]:
        products = (grad_gated.float() * raw.float()).view(-1, num_experts, rank).sum(-1)
        grad_gates = (products * scales).to(gates.dtype)
    grad_raw = _gate_rank(grad_gated, gates, scales, a.shape)
    grad_x = grad_raw @ flat_a if needed[0] else None
    if needed[2]:
        grad_a = (grad_raw.t() @ x).view(num_experts, rank, -1)
    if needed[3]:
        gated = _gate_rank(raw, gates, scales, a.shape)
        grad_b = (gated.t() @ grad).view(num_experts, rank, -1).transpose(1, 2)
    return grad_x, grad_gates, grad_a, grad_b


def _rows(a: Tensor, x: Tensor) -> Tensor:
    """(N, r, i) -> (N*r, i)"""
    return a.to(x.dtype).reshape(-1, a.shape[2])


def _columns(b: Tensor, x: Tensor) -> Tensor:
    """(N, o, r) -> (N*r, o)"""
    return b.to(x.dtype).transpose(1, 2).reshape(-1, b.shape[1])


def _gate_rank(values: Tensor, gates: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    num_experts, rank, _ = shape
    factors = (gates.float() * scales).to(values.dtype)
    return (values.view(-1, num_experts, rank) * factors[:, :, None]).view_as(values)
