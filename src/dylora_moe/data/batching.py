"""Rows -> batches of tensors, rows of like length together, in an order that seed and epoch decide alone."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.tokenize import IGNORED
from dylora_moe.errors import DataError

# Measured with batches of 8 rows, SmolLM2's and Gemma's tokenizers: Code Alpaca's rows fill 0.90 and 0.89 of
# a batch (0.65 and 0.61 unsorted); six domains of other lengths 0.88, with 2.4 domains a batch (2.6 unsorted).
POOL_BATCHES = 8


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
        """Int64 tensors: input_ids, attention_mask and labels "batch tokens", domain "batch"."""
        multiple = self.pad_to_multiple_of
        length = -(-max(map(len, rows)) // multiple) * multiple
        return {
            "input_ids": _padded([row.input_ids for row in rows], length, self.pad_token_id),
            "attention_mask": _padded([(1,) * len(row) for row in rows], length, 0),
            "labels": _padded([row.labels for row in rows], length, IGNORED),
            "domain": torch.tensor([row.domain for row in rows], dtype=torch.int64),
        }


def _padded(rows: Sequence[Sequence[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=torch.int64)


def plan_epoch(
    lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int, pool_batches: int = POOL_BATCHES
) -> list[list[int]]:
    """Cut an epoch into batches of row indices: every row once, like lengths together, batches shuffled.

    Rows are shuffled and cut into pools of `pool_batches` batches; only within a pool are they sorted, so
    that batches stay mixed. A larger pool pads less and mixes less. The last batch made may be smaller.
    """
    # A text seed is hashed whole, so that neighbouring seeds and epochs have nothing in common.
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * pool_batches):
        pool = sorted(order[start : start + batch_size * pool_batches], key=lengths.__getitem__)
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches


def fill_rate(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of a plan's padded tokens that are real ones, between 0 and 1."""
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return sum(lengths[index] for batch in batches for index in batch) / padded


class BucketedBatchSampler(Sampler[list[int]]):
    """`plan_epoch` as a DataLoader's `batch_sampler`.

    The order is a function of (seed, epoch): after a restart, `set_epoch(epoch, position)` goes on with
    batch number `position` of that epoch.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, pool_batches: int = POOL_BATCHES) -> None:
        if batch_size < 1 or pool_batches < 1:
            raise DataError(f"batch_size and pool_batches must be at least 1, got {batch_size} and {pool_batches}.")
        self.lengths = tuple(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool_batches = pool_batches
        self.epoch = 0
        self.position = 0

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Choose the epoch, and how many of its batches are done already (default none)."""
        if not 0 <= position <= self.num_batches:
            raise DataError(f"position must be between 0 and {self.num_batches} batches, got {position}.")
        self.epoch = epoch
        self.position = position

    @property
    def num_batches(self) -> int:
        """Batches in a whole epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __len__(self) -> int:
        """Batches left of the chosen epoch."""
        return self.num_batches - self.position

    def __iter__(self) -> Iterator[list[int]]:
        batches = plan_epoch(
            self.lengths,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            pool_batches=self.pool_batches,
        )
        yield from batches[self.position :]
