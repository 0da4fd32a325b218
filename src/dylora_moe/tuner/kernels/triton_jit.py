"""The Triton kernels: sorted slots in, products of the rank's size, sums at the tokens or gradients of factors out.

Imports triton, so it is itself imported when a kernel is launched first. Every kernel takes strides as they are, masks
what a block holds too much, multiplies in the dtype of the input (float32 without TF32) and adds up in float32.

No tensor's shape and no launch depends on how many tokens an expert has: programs are started for the most blocks that
there can be, `slots / BLOCK_SLOTS + experts`, and each finds its expert from the offsets on the device.

Legend: `rows` are tokens (n, features), `low` is of the rank's size (s, r), `factor` is A or B.
"""

import triton
import triton.language as tl
from triton import knobs

IS_INTERPRETED = bool(knobs.runtime.interpret)
"""Whether triton was imported with TRITON_INTERPRET=1: kernels run on the CPU, and slowly."""


@triton.jit
def _place(program, offsets, num_experts, EXPERTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr):
    """Expert of a program (`num_experts` or more where it is one too many), its first slot, the end of the expert's."""
    index = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + index, mask=index < num_experts, other=0)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index < num_experts), other=0)
    last_blocks = tl.cumsum((ends - starts + BLOCK_SLOTS - 1) // BLOCK_SLOTS, 0)
    expert = tl.sum((last_blocks <= program).to(tl.int32), 0)
    blocks_before = tl.max(tl.where(last_blocks <= program, last_blocks, 0), 0)
    start = tl.sum(tl.where(index == expert, starts, 0), 0)
    end = tl.sum(tl.where(index == expert, ends, 0), 0)
    return expert, start + (program - blocks_before) * BLOCK_SLOTS, end


@triton.jit
def _add_product(left, right, total, IS_WIDE: tl.constexpr):
    """total + left @ right; never in TF32, whose mantissa has 10 bits."""
    if IS_WIDE:  # the interpreter would multiply the bits of bfloat16 as whole numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _gate(weights, weight_stride, scales, scale_stride, expert, slot, is_slot):
    """Weight of each slot, and the scale of their expert."""
    weight = tl.load(weights + slot.to(tl.int64) * weight_stride, mask=is_slot, other=0.0).to(tl.float32)
    return weight, tl.load(scales + expert.to(tl.int64) * scale_stride).to(tl.float32)


@triton.jit
def shrink(
    rows,
    row_stride,
    row_step,
    factor,
    factor_expert,
    factor_rank,
    factor_feature,
    low,
    raw,
    weights,
    weight_stride,
    grad_weights,
    scales,
    scale_stride,
    token_of_slot,
    offsets,
    num_experts,
    features,
    rank,
    IS_BACKWARD: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """low[s] = rows[token of s] @ factor of its expert; grid (blocks of slots,).

    Backward: rows are the output's gradient, the factor is B; the weights' gradient is the product with `raw`, and
    `low` becomes the gradient of `raw`.
    """
    expert, first, end = _place(tl.program_id(0), offsets, num_experts, EXPERTS, BLOCK_SLOTS)  # pyright: ignore[reportGeneralTypeIssues]
    if expert >= num_experts:
        return
    slot = first + tl.arange(0, BLOCK_SLOTS)
    is_slot = slot < end
    token = tl.load(token_of_slot + slot, mask=is_slot, other=0).to(tl.int64)
    place = tl.arange(0, RANK)
    is_place = place < rank
    row_at = rows + token[:, None] * row_stride
    factor_at = factor + expert.to(tl.int64) * factor_expert + place[None, :].to(tl.int64) * factor_rank
    total = tl.zeros((BLOCK_SLOTS, RANK), tl.float32)
    for begin in range(0, features, BLOCK_FEATURES):
        feature = (begin + tl.arange(0, BLOCK_FEATURES)).to(tl.int64)
        is_feature = feature < features
        left = tl.load(row_at + feature[None, :] * row_step, mask=is_slot[:, None] & is_feature[None, :], other=0.0)
        right = tl.load(
            factor_at + feature[:, None] * factor_feature, mask=is_feature[:, None] & is_place[None, :], other=0.0
        )
        total = _add_product(left.to(low.dtype.element_ty), right.to(low.dtype.element_ty), total, IS_WIDE)
    low_at = slot[:, None].to(tl.int64) * rank + place[None, :]
    is_low = is_slot[:, None] & is_place[None, :]
    if IS_BACKWARD:
        weight, scale = _gate(weights, weight_stride, scales, scale_stride, expert, slot, is_slot)
        product = total * tl.load(raw + low_at, mask=is_low, other=0.0).to(tl.float32)
        tl.store(grad_weights + slot, tl.sum(product, 1) * scale, mask=is_slot)
        total = total * (weight * scale)[:, None]
    tl.store(low + low_at, total.to(low.dtype.element_ty), mask=is_low)


@triton.jit(do_not_specialize=["choice"])
def expand(
    low,
    factor,
    factor_expert,
    factor_rank,
    factor_feature,
    out,
    out_stride,
    out_step,
    weights,
    weight_stride,
    scales,
    scale_stride,
    token_of_slot,
    slot_order,
    offsets,
    num_experts,
    features,
    rank,
    choice,
    TOP_K: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_ADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """out[token of s] (+)= low[s] @ factor of its expert; grid (blocks of slots, blocks of features).

    Only of each token's slot number `choice`: in one launch no two slots meet at a token.
    """
    expert, first, end = _place(tl.program_id(0), offsets, num_experts, EXPERTS, BLOCK_SLOTS)  # pyright: ignore[reportGeneralTypeIssues]
    if expert >= num_experts:
        return
    slot = first + tl.arange(0, BLOCK_SLOTS)
    is_slot = slot < end
    if TOP_K > 1:
        is_slot = is_slot & (tl.load(slot_order + slot, mask=is_slot, other=0) % TOP_K == choice)
    token = tl.load(token_of_slot + slot, mask=is_slot, other=0).to(tl.int64)
    place = tl.arange(0, RANK)
    is_place = place < rank
    feature = (tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)).to(tl.int64)
    is_feature = feature < features
    left = tl.load(
        low + slot[:, None].to(tl.int64) * rank + place[None, :], mask=is_slot[:, None] & is_place[None, :], other=0.0
    )
    if IS_GATED:
        weight, scale = _gate(weights, weight_stride, scales, scale_stride, expert, slot, is_slot)
        left = (left.to(tl.float32) * (weight * scale)[:, None]).to(low.dtype.element_ty)
    right = tl.load(
        factor
        + expert.to(tl.int64) * factor_expert
        + place[:, None].to(tl.int64) * factor_rank
        + feature[None, :] * factor_feature,
        mask=is_place[:, None] & is_feature[None, :],
        other=0.0,
    ).to(low.dtype.element_ty)
    total = _add_product(left, right, tl.zeros((BLOCK_SLOTS, BLOCK_FEATURES), tl.float32), IS_WIDE)
    out_at = out + token[:, None] * out_stride + feature[None, :] * out_step
    is_out = is_slot[:, None] & is_feature[None, :]
    if IS_ADDED:
        total += tl.load(out_at, mask=is_out, other=0.0).to(tl.float32)
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_out)


@triton.jit
def collect(
    low,
    rows,
    row_stride,
    row_step,
    grad,
    grad_expert,
    grad_rank,
    grad_feature,
    weights,
    weight_stride,
    scales,
    scale_stride,
    token_of_slot,
    offsets,
    features,
    rank,
    IS_GATED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """grad[e] = sum over the slots s of expert e of low[s] rows[token of s]^T; grid (experts, blocks of features).

    One program adds up all slots of its expert in their order: zero where there are none, and no atomics.
    """
    expert = tl.program_id(0)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    place = tl.arange(0, RANK)
    is_place = place < rank
    feature = (tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)).to(tl.int64)
    is_feature = feature < features
    total = tl.zeros((RANK, BLOCK_FEATURES), tl.float32)
    for first in range(start, end, BLOCK_SLOTS):
        slot = first + tl.arange(0, BLOCK_SLOTS)
        is_slot = slot < end
        token = tl.load(token_of_slot + slot, mask=is_slot, other=0).to(tl.int64)
        left = tl.load(
            low + slot[None, :].to(tl.int64) * rank + place[:, None],
            mask=is_place[:, None] & is_slot[None, :],
            other=0.0,
        )
        if IS_GATED:
            weight, scale = _gate(weights, weight_stride, scales, scale_stride, expert, slot, is_slot)
            left = (left.to(tl.float32) * (weight * scale)[None, :]).to(low.dtype.element_ty)
        right = tl.load(
            rows + token[:, None] * row_stride + feature[None, :] * row_step,
            mask=is_slot[:, None] & is_feature[None, :],
            other=0.0,
        ).to(low.dtype.element_ty)
        total = _add_product(left, right, total, IS_WIDE)
    grad_at = (
        grad
        + expert.to(tl.int64) * grad_expert
        + place[:, None].to(tl.int64) * grad_rank
        + feature[None, :] * grad_feature
    )
    tl.store(grad_at, total.to(grad.dtype.element_ty), mask=is_place[:, None] & is_feature[None, :])
