"""Only what was routed, for any decision: tokens sorted by expert, one `grouped_mm` for each factor."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dylora_moe.tuner.kernels.in_place import Gradients, OverSlots
from dylora_moe.tuner.routing import Dispatch


def _add(out: Tensor, x: Tensor, weights: Tensor, a: Tensor, b: Tensor, scales: Tensor, plan: Dispatch) -> Tensor:
    """Forward: out (..., o), x (n, i), slot weights (s,) -> products (s, r)."""
    rows = _rows_at(x, plan.token_of_slot)
    raw = F.grouped_mm(rows, a.to(x.dtype).transpose(1, 2), offs=plan.offsets)
    gated = raw * _slot_gates(weights, scales, plan).to(x.dtype)
    slots = F.grouped_mm(gated, b.to(x.dtype).transpose(1, 2), offs=plan.offsets)
    _add_to_tokens(out.view(-1, out.shape[-1]), slots.to(out.dtype), plan)
    return raw


def _gradients(
    needed: Sequence[bool],
    grad: Tensor,
    plan: Dispatch,
    x: Tensor,
    weights: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    base: Tensor | None,
    raw: Tensor,
) -> Gradients:
    """Gradients of x, slot weights, A and B; None where not needed."""
    a, b, grad = a.to(x.dtype), b.to(x.dtype), grad.reshape(-1, grad.shape[-1]).to(x.dtype)
    gates = _slot_gates(weights, scales, plan)
    # grouped_mm refuses expanded (stride 0) gradients; the gather also makes them contiguous.
    grad_rows = _rows_at(grad, plan.token_of_slot)
    grad_gated = F.grouped_mm(grad_rows, b, offs=plan.offsets)
    grad_x = grad_weights = grad_a = grad_b = None
    if needed[1]:
        per_slot = (grad_gated.float() * raw.float()).sum(-1)
        grad_weights = (per_slot * scales.index_select(0, plan.expert_of_slot)).to(weights.dtype)
    grad_raw = grad_gated * gates.to(x.dtype)
    if needed[0]:
        grad_slots = F.grouped_mm(grad_raw, a, offs=plan.offsets)
        if base is None:
            grad_x = _sum_to_tokens(grad_slots, plan, x.shape[0])
        else:
            grad_x = grad @ base
            _add_to_tokens(grad_x, grad_slots, plan)
    if needed[2]:
        rows = _rows_at(x, plan.token_of_slot)
        grad_a = F.grouped_mm(grad_raw.t(), rows, offs=plan.offsets)
    if needed[3]:
        gated = raw * gates.to(x.dtype)
        # In the parameter's own layout: of another, autograd would make a copy.
        grad_b = F.grouped_mm(grad_rows.t(), gated, offs=plan.offsets)
    return grad_x, grad_weights, grad_a, grad_b


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
    """Sorted slots -> tokens; sums of gathered rows, since index_add_ of duplicates is not deterministic."""
    top_k = slots.shape[0] // max(tokens, 1)
    if top_k <= 1:
        return _rows_at(slots, plan.sorted_of_slot)
    # Gather and sum in one, in the order of the choices: a third of the time of the two by themselves.
    return F.embedding_bag(plan.sorted_of_slot.view(tokens, top_k), slots, mode="sum")


def _rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values[index]; as an embedding lookup, up to twice as fast as index_select on CPU."""
    return F.embedding(index, values)


grouped = OverSlots(add=_add, gradients=_gradients)
"""Strides must be multiples of 16 bytes: the rank divisible by 4 in float32, by 8 in 16-bit dtypes."""
