"""The executions: sum over experts of weight * scale * B A x, for all tokens of a batch.

Six ways to the same numbers. `reference` is the obvious loop, for tests and odd dtypes. `bottleneck` runs all
experts as one wide product with the gate at the rank: FLOPs grow with the experts, launches do not. `rowwise` gives
each row of the batch its own factors, where every row has one decision. `grouped` sorts tokens by expert once a
batch, for any decision; `triton` does the same by kernels of its own, on GPUs. These save the input and products of
the rank's size for backward, nothing else. `few` is for a few tokens without gradients.

Legend for shapes: n tokens, s slots (tokens * top_k), N experts, r rank, i features in, o features out, R rows of
the batch, T tokens of a row, k experts of one decision.
"""

from dylora_moe.tuner.kernels.bottleneck import bottleneck
from dylora_moe.tuner.kernels.few import Part, few
from dylora_moe.tuner.kernels.grouped import grouped
from dylora_moe.tuner.kernels.liger import has_liger, liger_loss
from dylora_moe.tuner.kernels.machine import require_triton, takes_triton
from dylora_moe.tuner.kernels.reference import reference
from dylora_moe.tuner.kernels.rowwise import rowwise
from dylora_moe.tuner.kernels.trial import are_near
from dylora_moe.tuner.kernels.triton import triton

__all__ = [
    "Part",
    "are_near",
    "bottleneck",
    "few",
    "grouped",
    "has_liger",
    "liger_loss",
    "reference",
    "require_triton",
    "rowwise",
    "takes_triton",
    "triton",
]
