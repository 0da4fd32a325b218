"""The executions: sum over experts of weight * scale * B A x, for all tokens of a batch.

Three ways to the same numbers. `reference` is the obvious loop, for tests and odd dtypes. `bottleneck` runs all
experts as one wide product with the gate at the rank: FLOPs grow with the experts, launches do not. `grouped`
sorts tokens by expert once a batch and runs only what was routed. The last two save the input and the gates
for backward, nothing else; products of the rank's size are made again.

Legend for einsum and shapes: n tokens, s slots (tokens * top_k), N experts, r rank, i features in, o features out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dylora_moe.tuner.routing import Decision, Dispatch


def reference(
    x: Float[Tensor, "tokens features_in"],
    gates: Float[Tensor, "tokens experts"],
    lora_a: Float[Tensor, "experts rank features_in"],
    lora_b: Float[Tensor, "experts features_out rank"],
    scales: Float[Tensor, " experts"],
) -> Float[Tensor, "tokens features_out"]:
    """Slow and obvious: every expert on every token, weighted; a zero gate contributes exactly zero."""
    out = torch.zeros(x.shape[0], lora_b.shape[1], dtype=x.dtype, device=x.device)
    for expert in range(lora_a.shape[0]):
        low_rank = F.linear(F.linear(x, lora_a[expert].to(x.dtype)), lora_b[expert].to(x.dtype))
        out = out + gates[:, expert, None].to(x.dtype) * scales[expert] * low_rank
    return out


def full_gates(decision: Decision) -> Float[Tensor, "tokens experts"]:
    """The weights of a decision as a full matrix, zero where an expert was not chosen; differentiable."""
    weights, experts = decision.token_weights(), decision.token_experts()
    if experts is None:
        return weights
    empty = torch.zeros(weights.shape[0], decision.num_experts, dtype=weights.dtype, device=weights.device)
    return empty.scatter(1, experts, weights)


class _Bottleneck(torch.autograd.Function):
    """(x, gates, A (N, r, i), B (N, o, r), scales (N,)) -> delta (n, o)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, gates, a, b, scales)
        with _as_is(x):
            gated = _gate_rank(x @ _rows(a, x).t(), gates, scales, a.shape)
            return gated @ _columns(b, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is an error
        with _as_is(saved[0]):
            return *_bottleneck_grads(ctx.needs_input_grad, grad, *saved), None


def _bottleneck_grads(
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


class _Grouped(torch.autograd.Function):
    """(out (..., o), x (n, i), slot weights (s,), A (N, r, i), B (N, o, r), scales (N,), dispatch) -> out + delta.

    `out`, the frozen Linear's own output, is changed in place: nobody's backward needs it.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, weights: Tensor, a: Tensor, b: Tensor, scales: Tensor, plan: Dispatch
    ) -> Tensor:
        ctx.mark_dirty(out)
        ctx.plan = plan
        with _as_is(x):
            rows = _rows_at(x, plan.token_of_slot)
            raw = F.grouped_mm(rows, a.to(x.dtype).transpose(1, 2), offs=plan.offsets)
            gated = raw * _slot_gates(weights, scales, plan).to(x.dtype)
            slots = F.grouped_mm(gated, b.to(x.dtype).transpose(1, 2), offs=plan.offsets)
            _add_to_tokens(out.view(-1, out.shape[-1]), slots.to(out.dtype), plan)
        ctx.save_for_backward(x, weights, a, b, scales, raw)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        with _as_is(saved[0]):
            return grad, *_grouped_grads(ctx.needs_input_grad[1:], flat, ctx.plan, *saved), None, None


def _grouped_grads(
    needed: Sequence[bool],
    grad: Tensor,
    plan: Dispatch,
    x: Tensor,
    weights: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    raw: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, slot weights, A and B; None where not needed."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    gates = _slot_gates(weights, scales, plan)
    # grouped_mm refuses expanded (stride 0) gradients; the gather also makes them contiguous.
    grad_rows = _rows_at(grad.to(x.dtype), plan.token_of_slot)
    grad_gated = F.grouped_mm(grad_rows, b, offs=plan.offsets)
    grad_x = grad_weights = grad_a = grad_b = None
    if needed[1]:
        per_slot = (grad_gated.float() * raw.float()).sum(-1)
        grad_weights = (per_slot * scales.index_select(0, plan.expert_of_slot)).to(weights.dtype)
    grad_raw = grad_gated * gates.to(x.dtype)
    if needed[0]:
        grad_slots = F.grouped_mm(grad_raw, a, offs=plan.offsets)
        grad_x = _sum_to_tokens(grad_slots, plan, x.shape[0])
    if needed[2]:
        rows = _rows_at(x, plan.token_of_slot)
        grad_a = F.grouped_mm(grad_raw.t(), rows, offs=plan.offsets)
    if needed[3]:
        gated = raw * gates.to(x.dtype)
        # In the parameter's own layout: of another, autograd would make a copy.
        grad_b = F.grouped_mm(grad_rows.t(), gated, offs=plan.offsets)
    return grad_x, grad_weights, grad_a, grad_b


class _Packed(torch.autograd.Function):
    """(storage (N, ...), first experts, *parameters, each a run of it) -> storage, with a gradient for each run."""

    @staticmethod
    def forward(ctx: Any, storage: Tensor, starts: Sequence[int], *params: Tensor) -> Tensor:
        ctx.runs = [(start, start + param.shape[0]) for start, param in zip(starts, params, strict=True)]
        return storage.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *(grad[start:stop] for start, stop in ctx.runs)


def packed(
    storage: Float[Tensor, "experts *shape"], starts: Sequence[int], runs: Sequence[Tensor]
) -> Float[Tensor, "experts *shape"]:
    """The factors of all experts, such that gradients reach `runs`: parameters that are storage[start:stop]."""
    return _Packed.apply(storage, starts, *runs)  # type: ignore[return-value]


def bottleneck(
    x: Float[Tensor, "tokens features_in"],
    gates: Float[Tensor, "tokens experts"],
    lora_a: Float[Tensor, "experts rank features_in"],
    lora_b: Float[Tensor, "experts features_out rank"],
    scales: Float[Tensor, " experts"],
) -> Float[Tensor, "tokens features_out"]:
    """All experts as one product of width N * r, gated at the rank."""
    return _Bottleneck.apply(x, gates, lora_a, lora_b, scales)  # type: ignore[return-value]


def grouped(
    out: Float[Tensor, "*batch features_out"],
    x: Float[Tensor, "tokens features_in"],
    slot_weights: Float[Tensor, " slots"],
    lora_a: Float[Tensor, "experts rank features_in"],
    lora_b: Float[Tensor, "experts features_out rank"],
    scales: Float[Tensor, " experts"],
    plan: Dispatch,
) -> Float[Tensor, "*batch features_out"]:
    """Adds the routed products, and only those, to `out` in place: one `grouped_mm` for each factor.

    Strides must be multiples of 16 bytes: the rank divisible by 4 in float32, by 8 in 16-bit dtypes.
    """
    return _Grouped.apply(out, x, slot_weights, lora_a, lora_b, scales, plan)  # type: ignore[return-value]


def _as_is(x: Tensor) -> torch.autocast:
    """Compute in the dtypes given: autocast would change some products of a chain and not others."""
    return torch.autocast(x.device.type, enabled=False)


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


def _slot_gates(weights: Tensor, scales: Tensor, plan: Dispatch) -> Tensor:
    """Weight times scale of each sorted slot, (s, 1), float32."""
    return (weights.float() * scales.index_select(0, plan.expert_of_slot))[:, None]


def _add_to_tokens(out: Tensor, slots: Tensor, plan: Dispatch) -> None:
    """Add sorted slots (s, o) to their tokens (n, o), in place."""
    if slots.shape[0] == out.shape[0]:  # one slot a token: no two rows meet
        # A third faster than index_add_ on CPU, and as exact.
        out.scatter_add_(0, plan.token_of_slot[:, None].expand_as(slots), slots)
    else:
        out += _sum_to_tokens(slots, plan, out.shape[0])


def _sum_to_tokens(slots: Tensor, plan: Dispatch, tokens: int) -> Tensor:
    """Sorted slots -> tokens; an inverse gather and a sum, since index_add_ of duplicates is not deterministic."""
    in_order = _rows_at(slots, plan.sorted_of_slot)
    top_k = slots.shape[0] // max(tokens, 1)
    return in_order if top_k == 1 else in_order.view(tokens, top_k, -1).sum(1)


def _rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values[index]; as an embedding lookup, up to twice as fast as index_select on CPU."""
    return F.embedding(index, values)
