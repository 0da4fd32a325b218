"""Rows -> batches of tensors, rows of like length together, in an order that seed and epoch decide alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.mixing import Mixture, concatenate, epoch_order, shuffled
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.errors import DataError

NO_DOMAIN = -1  # of a token that only fills a row
# Measured with batches of 8 rows: Code Alpaca's rows fill 0.96 of a batch with SmolLM2's tokenizer and 0.95 with
# Gemma's (0.88 and 0.86 with pools of 8 batches, 0.61 and 0.57 unsorted); six domains of other lengths 0.90 (0.74,
# 0.40), with 3.5 domains a batch (3.7, 6.0).
POOL_BATCHES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRow:
    """One row to train or evaluate on.

    Attributes:
        input_ids: Prompt, answer, end token.
        labels: As long; `IGNORED` where nothing is learned.
        domain: Index into the bundle's domains.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    domain: int

    def __len__(self) -> int:
        return len(self.input_ids)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short rows; it is masked, so a tokenizer without one pads with its end token."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise DataError("A tokenizer must have a padding or an end token, got neither. Set tokenizer.eos_token.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Rows -> one batch, padded on the right to the longest of them.

    Attributes:
        pad_token_id: What fills `input_ids`; masked, so any id will do.
        pad_to_multiple_of: Round the length up to a multiple of this; 8 suits tensor cores.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[TokenizedRow]) -> dict[str, Tensor]:
        """Int64 tensors of "batch tokens": input_ids, attention_mask, labels, and domain, `NO_DOMAIN` at padding.

        No rows make a row of padding, which takes part in a pass and counts for nothing.
        """
        if not rows:
            return {**filler(self.pad_token_id), "attention_mask": torch.ones(1, FILLER_TOKENS, dtype=torch.int64)}
        multiple = self.pad_to_multiple_of
        length = -(-max(map(len, rows)) // multiple) * multiple
        return {
            "input_ids": _padded([row.input_ids for row in rows], length, self.pad_token_id),
            "attention_mask": _padded([(1,) * len(row) for row in rows], length, 0),
            "labels": _padded([row.labels for row in rows], length, IGNORED),
            "domain": _padded([(row.domain,) * len(row) for row in rows], length, NO_DOMAIN),
        }


FILLER_TOKENS = 2  # of a row of padding: the first one foretells the second, if only that were wanted


def filler(pad_token_id: int) -> dict[str, Tensor]:
    """A row of padding for a process that a batch leaves without any: it counts for nothing.

    It is attended to, since attention over nothing gives no numbers.
    """
    values = {"input_ids": pad_token_id, "labels": IGNORED, "domain": NO_DOMAIN}
    return {name: torch.full((1, FILLER_TOKENS), value, dtype=torch.int64) for name, value in values.items()}


def _padded(rows: Sequence[Sequence[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=torch.int64)


def plan_epoch(
    lengths: ArrayLike,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    pool_batches: int = POOL_BATCHES,
    mixture: Mixture | None = None,
) -> list[list[int]]:
    """Cut an epoch into batches of row indices: like lengths together, batches shuffled.

    The epoch's rows are cut into pools of `pool_batches` batches; only within a pool are they sorted, so that batches
    stay mixed. A larger pool pads less and mixes less. The last batch made may be smaller.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch, over all ranks.
        seed: With the epoch, decides the order.
        epoch: Counted from 0.
        pool_batches: Batches of a pool.
        mixture: Which rows an epoch has; None for every row once.
    """
    lengths = np.asarray(lengths)
    order = epoch_order(mixture or concatenate(np.zeros(len(lengths), dtype=np.int64)), seed=seed, epoch=epoch)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * pool_batches):
        pool = order[start : start + batch_size * pool_batches]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[at : at + batch_size].tolist() for at in range(0, len(pool), batch_size)]
    return [batches[index] for index in shuffled(len(batches), f"batches/{seed}/{epoch}")]


T = TypeVar("T")


class PlannedBatchSampler(Sampler[list[T]], ABC, Generic[T]):
    """A DataLoader's `batch_sampler` whose order is a function of (seed, epoch) alone.

    After a restart, `set_epoch(epoch, position)` goes on with batch number `position` of that epoch: two integers are
    all that resuming needs. Every rank makes the same plan and takes its share of each batch, which may be empty, so
    that the batch over all ranks is the same whatever their number. Every epoch has the same number of batches.
    """

    def __init__(self, *, batch_size: int, rank: int, num_ranks: int) -> None:
        if batch_size < 1 or batch_size % num_ranks:
            raise DataError(
                f"The batch over all ranks must be a positive multiple of their number {num_ranks}, got {batch_size}. "
                "Change batch_size or the number of processes."
            )
        if not 0 <= rank < num_ranks:
            raise DataError(f"rank must be between 0 and {num_ranks - 1}, got {rank}.")
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self.epoch = 0
        self.position = 0

    @property
    @abstractmethod
    def num_batches(self) -> int:
        """Batches in a whole epoch, the same in each."""

    @abstractmethod
    def plan(self, epoch: int) -> list[list[T]]:
        """The batches of an epoch over all ranks."""

    @abstractmethod
    def size(self, item: T) -> int:
        """Tokens of one item of a batch."""

    def fill_rate(self, epoch: int = 0) -> float:
        """The share of an epoch's tokens that are no padding, each batch padded to its longest item; 0 to 1."""
        sizes = [[self.size(item) for item in batch] for batch in self.plan(epoch)]
        return sum(map(sum, sizes)) / sum(len(batch) * max(batch) for batch in sizes)

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Choose the epoch, and how many of its batches are done already (default none)."""
        if not 0 <= position <= self.num_batches:
            raise DataError(f"position must be between 0 and {self.num_batches} batches, got {position}.")
        self.epoch = epoch
        self.position = position

    def __len__(self) -> int:
        """Batches left of the chosen epoch."""
        return self.num_batches - self.position

    def __iter__(self) -> Iterator[list[T]]:
        for batch in self.plan(self.epoch)[self.position :]:
            # All ranks take part in every step; collators fill up for one that a short last batch leaves nothing.
            yield batch[self.rank :: self.num_ranks]


class BucketedBatchSampler(PlannedBatchSampler[int]):
    """`plan_epoch` as a sampler.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch, over all ranks.
        seed: Decides the order, with the epoch.
        pool_batches: As in `plan_epoch`.
        mixture: Which rows an epoch has; None for every row once.
        rank: Number of this process, from 0.
        num_ranks: Data-parallel processes.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        *,
        batch_size: int,
        seed: int,
        pool_batches: int = POOL_BATCHES,
        mixture: Mixture | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if pool_batches < 1:
            raise DataError(f"pool_batches must be at least 1, got {pool_batches}.")
        super().__init__(batch_size=batch_size, rank=rank, num_ranks=num_ranks)
        self.lengths, self.seed, self.pool_batches = np.asarray(lengths, dtype=np.int32), seed, pool_batches
        self.mixture = mixture or concatenate(np.zeros(len(self.lengths), dtype=np.int64))

    @property
    def num_batches(self) -> int:
        """Batches in a whole epoch."""
        return -(-len(self.mixture) // self.batch_size)

    def plan(self, epoch: int) -> list[list[int]]:
        """Row indices of each batch."""
        return plan_epoch(
            self.lengths,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=epoch,
            pool_batches=self.pool_batches,
            mixture=self.mixture,
        )

    def size(self, item: int) -> int:
        """Tokens of a row."""
        return int(self.lengths[item])


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts to be gone on with -> ids and attention mask, (batch, tokens), each row at the right end."""
    longest = max(map(len, rows))
    ids = [[pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
