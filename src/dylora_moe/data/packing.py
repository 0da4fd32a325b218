"""Documents -> rows of at most `max_length` tokens, several in each, that never see each other.

A packed batch has position ids that restart with each document and no attention mask: transformers then confines
attention to a document, provided that no cache is used (an all-ones mask or a cache lets documents see each other; the
tests compare logits). Each token carries the domain of its document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from dylora_moe.data.batching import FILLER_TOKENS, NO_DOMAIN, PlannedBatchSampler, TokenizedRow, filler
from dylora_moe.data.mixing import Mixture, concatenate, epoch_order
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.errors import DataError

Pack = tuple[int, ...]
"""Indices of the documents of one row."""


def pack_documents(lengths: ArrayLike, order: ArrayLike, *, max_length: int) -> list[Pack]:
    """Fill rows by best-fit decreasing: every document of `order` once, longest first, each where least stays free.

    Documents of equal length keep the order given, which so decides who shares a row; rows come in the order of their
    longest document.

    Args:
        lengths: Tokens of each document, at least 1.
        order: The documents of an epoch; one may come several times.
        max_length: The most tokens of a row.

    Raises:
        DataError: A document has more than `max_length` tokens.
    """
    order = np.asarray(order, dtype=np.int64)
    sizes = np.asarray(lengths)[order]
    longest = sizes.max(initial=0)
    if longest > max_length:
        raise DataError(
            f"Every document must fit into a row of max_length={max_length} tokens, but the longest has {longest}. "
            "Raise max_length, or set overlong."
        )
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0  # bit r is set where a row has r tokens free, so that the best fit is the lowest bit from a length up
    longest_first = np.argsort(-sizes, kind="stable")
    for place, length in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(place)
        if room > length:
            with_room[room - length].append(pack)
            rooms |= 1 << (room - length)
    return [tuple(order[pack].tolist()) for pack in sorted(packs)]


class PackedBatchSampler(PlannedBatchSampler[Pack]):
    """Batches of packs, as indices into a `PackedDataset`.

    Args:
        lengths: Tokens of each document.
        max_length: The most tokens of a pack.
        batch_size: Packs of a batch, over all ranks; now and then one more or less, since epochs that draw other
            documents need other numbers of packs.
        seed: Decides the order, with the epoch.
        mixture: Which documents an epoch has; None for every one once.
        rank: Number of this process, from 0.
        num_ranks: Data-parallel processes.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        mixture: Mixture | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        super().__init__(batch_size=batch_size, rank=rank, num_ranks=num_ranks)
        self.lengths, self.max_length, self.seed = np.asarray(lengths, dtype=np.int32), max_length, seed
        self.mixture = mixture or concatenate(np.zeros(len(self.lengths), dtype=np.int64))
        self._num_batches = -(-len(self.packs(0)) // batch_size)

    def packs(self, epoch: int) -> list[Pack]:
        """The packs of an epoch over all ranks."""
        order = epoch_order(self.mixture, seed=self.seed, epoch=epoch)
        return pack_documents(self.lengths, order, max_length=self.max_length)

    @property
    def num_batches(self) -> int:
        """Batches in a whole epoch."""
        return self._num_batches

    def plan(self, epoch: int) -> list[list[Pack]]:
        """The packs of each batch, spread evenly."""
        packs, number = self.packs(epoch), self._num_batches
        while len(packs) < number:  # an epoch of shorter documents than the first one's
            fullest = max(range(len(packs)), key=lambda index: len(packs[index]))
            packs[fullest : fullest + 1] = [packs[fullest][::2], packs[fullest][1::2]]
        return [packs[len(packs) * at // number : len(packs) * (at + 1) // number] for at in range(number)]

    def size(self, item: Pack) -> int:
        """Tokens of a pack."""
        return int(self.lengths[list(item)].sum())


class PackedDataset(Dataset[tuple[TokenizedRow, ...]]):
    """Pack -> its documents; what a DataLoader with a `PackedBatchSampler` reads."""

    def __init__(self, rows: Sequence[TokenizedRow]) -> None:
        self.rows = rows

    def __getitem__(self, index: Pack) -> tuple[TokenizedRow, ...]:
        return tuple(self.rows[document] for document in index)

    def __len__(self) -> int:
        """Documents."""
        return len(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackCollator:
    """Packs -> one batch. A batch of one pack, or of packs that are equally full, has no padding.

    Attributes:
        pad_token_id: What fills `input_ids` behind the last document; any id will do.
        pad_to_multiple_of: Round the length up to a multiple of this; 8 suits tensor cores.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, packs: Sequence[Sequence[TokenizedRow]]) -> dict[str, Tensor]:
        """Int64 tensors of "batch tokens": input_ids, position_ids, labels and domain.

        Padding stands at the end of a row as a document of its own, labelled `IGNORED`, of domain `NO_DOMAIN`. The
        first label of a document is `IGNORED`: it could only be predicted from the document before. No packs make a
        row of padding.
        """
        if not packs:
            places = torch.arange(FILLER_TOKENS)[None]
            return {**filler(self.pad_token_id), "position_ids": places}
        multiple = self.pad_to_multiple_of
        length = -(-max(sum(map(len, pack)) for pack in packs) // multiple) * multiple
        rest = [length - sum(map(len, pack)) for pack in packs]
        columns = {
            "input_ids": [[token for row in pack for token in row.input_ids] for pack in packs],
            "position_ids": [[place for row in pack for place in range(len(row))] for pack in packs],
            "labels": [[label for row in pack for label in (IGNORED, *row.labels[1:])] for pack in packs],
            "domain": [[row.domain for row in pack for _ in range(len(row))] for pack in packs],
        }
        fillers = {"input_ids": self.pad_token_id, "labels": IGNORED, "domain": NO_DOMAIN}
        for name, rows in columns.items():
            for row, number in zip(rows, rest, strict=True):
                row += range(number) if name == "position_ids" else [fillers[name]] * number
        return {name: torch.tensor(rows, dtype=torch.int64) for name, rows in columns.items()}
