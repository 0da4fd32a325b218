"""Each row of the batch with the factors of its own experts: batched products, no sorting, nothing that N makes slower.

The form of BGMV (Punica, arXiv 2310.18547), here with a backward pass: factors are gathered for each row, R * k of
them, instead of the tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dylora_moe.tuner.kernels.in_place import Gradients, Products, add_in_place


def rowwise(
    out: Float[Tensor, "rows tokens features_out"],
    x: Float[Tensor, "rows tokens features_in"],
    weights: Float[Tensor, "rows chosen"],
    experts: Int[Tensor, "rows chosen"],
    lora_a: Float[Tensor, "experts rank features_in"],
    lora_b: Float[Tensor, "experts features_out rank"],
    scales: Float[Tensor, " experts"],
    base: Float[Tensor, "features_out features_in"] | None = None,
) -> Float[Tensor, "rows tokens features_out"]:
    """Adds the routed products to `out` in place; `base` as `add_in_place` has it."""
    return add_in_place(_PRODUCTS, out, x, weights, lora_a, lora_b, scales, experts, base)


def _add(out: Tensor, x: Tensor, weights: Tensor, a: Tensor, b: Tensor, scales: Tensor, experts: Tensor) -> Tensor:
    """Forward: out (R, T, o), x (R, T, i), weights (R, k) -> products (R, T, k*r)."""
    raw = torch.bmm(x, _of_rows(a, experts, x).transpose(1, 2))
    gated = raw * _rank_gates(weights, scales, experts, a.shape[1]).to(x.dtype)
    factor = _of_rows(b.transpose(1, 2), experts, x)
    if out.dtype == x.dtype:
        out.baddbmm_(gated, factor)
    else:
        out += torch.bmm(gated, factor).to(out.dtype)
    return raw


def _gradients(
    needed: Sequence[bool],
    grad: Tensor,
    experts: Tensor,
    x: Tensor,
    weights: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    base: Tensor | None,
    raw: Tensor,
) -> Gradients:
    """Gradients of x, weights, A and B; None where not needed."""
    grad, rank = grad.to(x.dtype), a.shape[1]
    gates = _rank_gates(weights, scales, experts, rank)
    grad_gated = torch.bmm(grad, _of_rows(b.transpose(1, 2), experts, x).transpose(1, 2))
    grad_raw = grad_gated * gates.to(x.dtype)
    grad_x = grad_weights = grad_a = grad_b = None
    if needed[0]:
        factor = _of_rows(a, experts, x)
        grad_x = torch.bmm(grad_raw, factor) if base is None else (grad @ base).baddbmm_(grad_raw, factor)
    if needed[1]:
        products = (grad_gated.float() * raw.float()).sum(1).unflatten(1, (-1, rank)).sum(-1)
        grad_weights = (products * scales[experts]).to(weights.dtype)
    if needed[2]:
        grad_a = _to_experts(torch.bmm(grad_raw.transpose(1, 2), x).unflatten(1, (-1, rank)), experts, a)
    if needed[3]:
        per_row = torch.bmm(grad.transpose(1, 2), raw * gates.to(x.dtype))
        grad_b = _to_experts(per_row.unflatten(2, (-1, rank)).movedim(2, 1), experts, b)
    return grad_x, grad_weights, grad_a, grad_b


def _of_rows(factor: Tensor, experts: Tensor, x: Tensor) -> Tensor:
    """Factors (N, r, features), chosen for each row and laid one below the other: (R, k*r, features)."""
    chosen = factor.index_select(0, experts.flatten()).to(x.dtype)
    return chosen.reshape(experts.shape[0], -1, factor.shape[2])


def _rank_gates(weights: Tensor, scales: Tensor, experts: Tensor, rank: int) -> Tensor:
    """Weight times scale for each of a row's k*r low-rank features, (R, 1, k*r), float32."""
    return (weights.float() * scales[experts]).repeat_interleave(rank, 1)[:, None]


def _to_experts(grads: Tensor, experts: Tensor, factor: Tensor) -> Tensor:
    """Gradients (R, k, ...) of each row's factors, summed for each expert: (N, ...).

    As a product: `index_add_` adds rows of one expert in no fixed order on a GPU.
    """
    member = F.one_hot(experts.flatten(), factor.shape[0]).to(grads.dtype)
    return (member.t() @ grads.reshape(member.shape[0], -1)).view_as(factor)


_PRODUCTS = Products(add=_add, gradients=_gradients)
