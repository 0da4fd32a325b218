"""Settings of a run -> which rows each batch of an epoch has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dylora_moe.config import RunConfig
from dylora_moe.data.batching import BucketedBatchSampler
from dylora_moe.data.mixing import Mixture, interleave, temper, weigh
from dylora_moe.data.packing import PackedBatchSampler
from dylora_moe.data.stored import Rows
from dylora_moe.errors import DataError


def make_sampler(
    config: RunConfig, rows: Rows, domains: Sequence[str], *, rank: int = 0, num_ranks: int = 1
) -> BucketedBatchSampler | PackedBatchSampler:
    """Batches of rows of like length, or of packs of rows.

    Args:
        config: Of the run.
        rows: To train on.
        domains: Their names; a row's `domain` is an index into this.
        rank: Number of this process, from 0.
        num_ranks: Processes that share each batch.

    Raises:
        DataError: The batch cannot be shared evenly, the weights do not name the domains there are, or interleaving is
            asked for of other than two.
    """
    mixture = _make_mixture(config, rows.domains, domains)
    lengths, common = rows.lengths, dict[str, Any](batch_size=config.batch_size, seed=config.seed, mixture=mixture)
    common |= {"rank": rank, "num_ranks": num_ranks}
    if config.packing:
        return PackedBatchSampler(lengths, max_length=config.max_length, **common)
    return BucketedBatchSampler(lengths, **common)


def _make_mixture(config: RunConfig, domain_of_row: NDArray[np.int32], domains: Sequence[str]) -> Mixture | None:
    """Which rows an epoch has; None for every row once."""
    weights = config.domain_weights
    if config.interleaved_sampling:
        return interleave(domain_of_row)
    if weights is None:
        return temper(domain_of_row, config.sampling_temperature) if config.sampling_temperature > 1 else None
    if weights.keys() != set(domains):
        raise DataError(
            f"domain_weights must name each domain ({', '.join(domains)}) and no other, got {', '.join(weights)}."
        )
    return weigh(domain_of_row, [weights[domain] for domain in domains])
