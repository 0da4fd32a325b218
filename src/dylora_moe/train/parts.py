"""A batch in equal parts: what a step does when the whole batch does not fit into memory."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from dylora_moe import ranks


def is_out_of_memory(error: BaseException) -> bool:
    """True for what a device says that has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def num_rows(batch: Mapping[str, Tensor]) -> int:
    """Rows of a batch, whose tensors all have them first."""
    return next(iter(batch.values())).shape[0]


def split_batch(batch: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The rows of a batch in order, in so many parts as equal as can be; fewer where it has fewer rows."""
    rows = num_rows(batch)
    parts = min(parts, rows)
    cuts = [rows * at // parts for at in range(parts + 1)]
    return [{name: value[start:end] for name, value in batch.items()} for start, end in pairwise(cuts)]


def split_together(
    batch: Mapping[str, Tensor], parts: int, make_padding: Callable[[], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """`split_batch` of a process's share: as many parts as any other process has, since all make the same passes.

    Args:
        batch: The share.
        parts: As of `split_batch`, the same in all processes.
        make_padding: Gives a part that counts for nothing, for a short last batch of which another has more rows.
    """
    own = split_batch(batch, parts)
    missing = ranks.most(len(own)) - len(own) if parts > 1 else 0
    return own + [make_padding() for _ in range(missing)]
