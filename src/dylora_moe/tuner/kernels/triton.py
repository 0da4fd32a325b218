"""As `grouped`, for CUDA: shrink, gate and expand as Triton kernels over the sorted slots, nothing gathered in between.

Launches: 1 + k forward, 3 + k backward, whatever the experts and their loads; no host synchronisation. What meets at a
token is added up choice by choice, one launch for each of its k slots, so nothing is added in an order of chance.

Block sizes come from a table, `_SIZES`, which was not tuned on a device: sizes usual for products so narrow, made
smaller until ptxas fits them into registers without spilling, and into the 99 KB of shared memory that a block has
everywhere from compute capability 8.0; a test compiles them. They depend on the rank and the dtype alone, so that a
token's bits do not depend on who else is there.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dylora_moe.tuner.kernels.in_place import Gradients, OverSlots
from dylora_moe.tuner.routing import Dispatch

# tl.dot takes blocks of 16 and more in each direction.
_LEAST_RANK = 16

MOST_RANK = 256
"""Ranks up to here have block sizes that fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Block sizes of the three kernels, for one rank (padded) and one width of numbers."""

    shrink: tuple[int, int]
    """Slots and features that one program holds at a time."""
    expand: tuple[int, int]
    collect: tuple[int, int]


_SIZES = {
    2: (
        (32, Sizes(shrink=(32, 128), expand=(64, 64), collect=(64, 64))),
        (128, Sizes(shrink=(32, 64), expand=(64, 64), collect=(64, 64))),
        (MOST_RANK, Sizes(shrink=(32, 32), expand=(32, 64), collect=(32, 64))),
    ),
    4: (
        (64, Sizes(shrink=(32, 32), expand=(32, 32), collect=(32, 32))),
        (128, Sizes(shrink=(32, 32), expand=(16, 32), collect=(32, 32))),
        (MOST_RANK, Sizes(shrink=(16, 32), expand=(16, 32), collect=(16, 32))),
    ),
}
"""Bytes of a number -> (largest rank, sizes). Products of float32 use no tensor core, and unroll into registers."""

_WARPS, _STAGES = 4, 3


def _add(out: Tensor, x: Tensor, weights: Tensor, a: Tensor, b: Tensor, scales: Tensor, plan: Dispatch) -> Tensor:
    """Forward: out (..., o), x (n, i), slot weights (s,) -> products (s, r)."""
    with _on(x):
        calls = _Calls(x, weights, scales, plan, a.shape[1])
        raw = calls.new_low()
        calls.shrink(x, a, raw)
        calls.expand(raw, b.transpose(1, 2), out.view(-1, out.shape[-1]), is_gated=True)
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
    grad = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_weights = grad_a = grad_b = None
    with _on(x):
        calls = _Calls(x, weights, scales, plan, a.shape[1])
        if needed[0] or needed[1] or needed[2]:
            grad_raw = calls.new_low()
            grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
            calls.shrink(grad, b.transpose(1, 2), grad_raw, raw=raw, grad_weights=grad_weights)
            if needed[0]:
                grad_x = torch.empty_like(x) if base is None else grad.to(x.dtype) @ base
                calls.expand(grad_raw, a, grad_x, is_new=base is None)
            if needed[2]:
                grad_a = torch.empty_like(a)
                calls.collect(grad_raw, x, grad_a)
        if needed[3]:
            grad_b = torch.empty_like(b)
            calls.collect(raw, grad, grad_b.transpose(1, 2), is_gated=True)
    return grad_x, grad_weights if needed[1] else None, grad_a, grad_b


class _Calls:
    """The three kernels with what they share in one pass. Factors and their gradients are (N, r, features) here."""

    def __init__(self, x: Tensor, weights: Tensor, scales: Tensor, plan: Dispatch, rank: int) -> None:
        self._x, self._plan, self._rank = x, plan, rank
        self._slots, self._experts = plan.token_of_slot.shape[0], plan.offsets.shape[0]
        self._top_k = self._slots // max(x.shape[0], 1)
        self._gates = (weights, weights.stride(0), scales, scales.stride(0))
        padded = max(_power_of_two(rank), _LEAST_RANK)
        self._sizes = block_sizes(padded, x.dtype)
        self._meta = {"RANK": padded, "num_warps": _WARPS, "num_stages": _STAGES}

    def new_low(self) -> Tensor:
        """Room for what is of the rank's size."""
        return self._x.new_empty(self._slots, self._rank)

    def shrink(
        self,
        rows: Tensor,
        factor: Tensor,
        low: Tensor,
        *,
        raw: Tensor | None = None,
        grad_weights: Tensor | None = None,
    ) -> None:
        """Rows (n, features) -> low (s, r); given `raw`, the backward form, which fills `grad_weights` as well."""
        weights, weight_stride, scales, scale_stride = self._gates
        slots, features = self._sizes.shrink
        _launch(
            "shrink",
            (self._blocks(slots),),
            *(rows, *rows.stride(), factor, *factor.stride(), low),
            *(low if raw is None else raw, weights, weight_stride),
            *(weights if grad_weights is None else grad_weights, scales, scale_stride),
            *(self._plan.token_of_slot, self._plan.offsets, self._experts, rows.shape[1], self._rank),
            IS_BACKWARD=raw is not None,
            EXPERTS=_power_of_two(self._experts),
            BLOCK_SLOTS=slots,
            BLOCK_FEATURES=features,
            **self._meta,
        )

    def expand(self, low: Tensor, factor: Tensor, out: Tensor, *, is_gated: bool = False, is_new: bool = False) -> None:
        """Low (s, r) -> added to out (n, features), or written to it where it is new."""
        slots, features = self._sizes.expand
        grid = (self._blocks(slots), -(-out.shape[1] // features))
        for choice in range(self._top_k):
            _launch(
                "expand",
                grid,
                *(low, factor, *factor.stride(), out, *out.stride(), *self._gates),
                *(self._plan.token_of_slot, self._plan.slot_order, self._plan.offsets, self._experts),
                *(out.shape[1], self._rank, choice),
                TOP_K=self._top_k,
                IS_GATED=is_gated,
                IS_ADDED=not is_new or choice > 0,
                EXPERTS=_power_of_two(self._experts),
                BLOCK_SLOTS=slots,
                BLOCK_FEATURES=features,
                **self._meta,
            )

    def collect(self, low: Tensor, rows: Tensor, grad: Tensor, *, is_gated: bool = False) -> None:
        """Low (s, r) and rows (n, features) -> the gradient of a factor, zero for an expert without slots."""
        slots, features = self._sizes.collect
        _launch(
            "collect",
            (self._experts, -(-rows.shape[1] // features)),
            *(low, rows, *rows.stride(), grad, *grad.stride(), *self._gates),
            *(self._plan.token_of_slot, self._plan.offsets, rows.shape[1], self._rank),
            IS_GATED=is_gated,
            BLOCK_SLOTS=slots,
            BLOCK_FEATURES=features,
            **self._meta,
        )

    def _blocks(self, slots: int) -> int:
        """The most blocks of slots that there can be: every expert's last one may be partly empty."""
        return -(-self._slots // slots) + self._experts


def block_sizes(rank: int, dtype: torch.dtype) -> Sizes:
    """Sizes for a rank that is a power of two, 16 to `MOST_RANK`."""
    return next(sizes for most, sizes in _SIZES[dtype.itemsize] if rank <= most)


def _power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (number - 1).bit_length()


def _launch(name: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Start one kernel; the only place that does."""
    from dylora_moe.tuner.kernels import triton_jit

    kernel: Callable[..., Any] = getattr(triton_jit, name)[grid]
    kernel(*args, IS_WIDE=triton_jit.IS_INTERPRETED, **meta)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever holds the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


triton = OverSlots(add=_add, gradients=_gradients)
"""Any rank up to `MOST_RANK`, widths and strides; float32, bfloat16 and float16."""
