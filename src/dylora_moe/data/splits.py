"""Examples of a domain -> a training and a validation side that share no prompt, and subsets of them.

Examples are named by their places in one list of them all, which is read one example at a time.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dylora_moe.data.cleaning import (
    SIMILARITY,
    Cleaned,
    Reason,
    Removed,
    remove_broken,
    remove_duplicates,
    remove_leaks,
)
from dylora_moe.data.example import Example, Message
from dylora_moe.data.sources import SourceRecord
from dylora_moe.data.stored import Stored
from dylora_moe.errors import DataError

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set that was read: what is known of it, and the places of the examples of its official splits.

    `num_unused` counts the examples of splits that are for neither training, validation nor test, and `num_not_drawn`
    the training rows beyond `num_examples`.
    """

    record: SourceRecord
    train: Places
    validation: Places
    test: Places
    num_unused: int = 0
    num_not_drawn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """An example that cleaning removed; `other` is the place of the one that it is too much like."""

    place: int
    reason: Reason
    detail: str
    other: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Places of the examples of one domain on their sides, and those left out on the way with their reasons.

    `num_not_drawn` counts sound rows that `num_examples` or a subset leaves out.
    """

    train: Places
    validation: Places
    test: Places
    removed: tuple[LeftOut, ...]
    num_not_drawn: int


def split_domain(
    domain: str,
    examples: Stored[Example],
    sources: Sequence[Source],
    fraction: float,
    seed: int,
    *,
    scratch: Path | None = None,
) -> Split:
    """Sound and distinct rows; official validation where a source has one, ours for the others.

    Raises:
        DataError: There are too few prompts to split.
    """
    official = _join(source.validation for source in sources)
    official_train = _join(source.train for source in sources if len(source.validation))
    undivided = _join(source.train for source in sources if not len(source.validation))
    # Those for validation first: of two copies on both sides the one for training goes.
    places = np.concatenate([official, official_train, undivided])
    cleaned = remove_broken(examples.take(places))
    removed = _left_out(places, cleaned, {})
    places = places[cleaned.kept]
    cleaned = remove_duplicates(examples.take(places), similarity=_similarity(sources), scratch=scratch)
    removed += _left_out(places, cleaned, {"": places})
    kept = np.zeros(len(examples), dtype=np.bool_)
    kept[places[cleaned.kept]] = True
    official, official_train, undivided = (group[kept[group]] for group in (official, official_train, undivided))
    train = validation = np.zeros(0, dtype=np.int64)
    if len(undivided):
        try:
            train, validation = split_by_prompt(examples.take(undivided), fraction=fraction, seed=seed)
        except DataError as error:
            raise DataError(f"Domain {domain!r}: {error}") from error
    return Split(
        train=np.concatenate([official_train, undivided[train]]),
        validation=np.concatenate([official, undivided[validation]]),
        test=_join(source.test for source in sources),
        removed=tuple(removed),
        num_not_drawn=sum(source.num_not_drawn for source in sources),
    )


def without_leaks(
    examples: Stored[Example], splits: Mapping[str, Split], *, scratch: Path | None = None
) -> dict[str, Split]:
    """The same splits, without training rows whose prompt, or one much like it, is held out in any domain."""
    places = _join(split.train for split in splits.values())
    held_out = {
        "validation": _join(split.validation for split in splits.values()),
        "test": _join(split.test for split in splits.values()),
    }
    held_out_examples = {name: examples.take(held) for name, held in held_out.items()}
    cleaned = remove_leaks(examples.take(places), held_out_examples, scratch=scratch)
    leaks = {left.place: left for left in _left_out(places, cleaned, held_out)}
    leaking = np.zeros(len(examples), dtype=np.bool_)
    leaking[list(leaks)] = True
    return {
        domain: replace(
            split,
            train=split.train[~leaking[split.train]],
            removed=(*split.removed, *(leaks[place] for place in split.train[leaking[split.train]].tolist())),
        )
        for domain, split in splits.items()
    }


def _join(groups: Iterable[Places]) -> Places:
    return np.concatenate([np.zeros(0, dtype=np.int64), *groups])


def _left_out(places: Places, cleaned: Cleaned, lists: Mapping[str, Places]) -> list[LeftOut]:
    def name(removed: Removed) -> LeftOut:
        other = None if removed.other is None else int(lists[removed.other[0]][removed.other[1]])
        return LeftOut(place=int(places[removed.index]), reason=removed.reason, detail=removed.detail, other=other)

    return [name(removed) for removed in cleaned.removed]


def _similarity(sources: Sequence[Source]) -> float | None:
    """Made examples are as varied as they were meant to be; only copies of them are too many."""
    return None if all(source.record.is_synthetic for source in sources) else SIMILARITY


def take_subsets(
    examples: Stored[Example], split: Split, training_subset: float | None, eval_subset: float | None, seed: int
) -> Split:
    """Keep these percentages of the two sides, all where None; a smaller share is part of a larger one."""
    train = _subset(examples, split.train, training_subset, seed)
    validation = _subset(examples, split.validation, eval_subset, seed)
    lost = len(split.train) - len(train) + len(split.validation) - len(validation)
    return replace(split, train=train, validation=validation, num_not_drawn=split.num_not_drawn + lost)


def _subset(examples: Stored[Example], places: Places, percent: float | None, seed: int) -> Places:
    if percent is None or not len(places):
        return places
    number = max(1, round(len(places) * percent / 100))
    keys = (_prompt_key(example) + example.answer for example in examples.take(places))
    chosen = np.argsort(_ranks(f"subset/{seed}", keys, len(places)), kind="stable")[:number]
    return places[np.sort(chosen)]


def split_by_prompt(examples: Sequence[Example], *, fraction: float, seed: int) -> tuple[Places, Places]:
    """Places of training and of validation examples, such that no prompt is on both sides.

    The sides depend on the seed and the prompts, not on their order, and both keep the order given.
    Validation has at most `fraction` of the examples, but at least one prompt.

    Raises:
        DataError: There are fewer than two prompts.
    """
    ranks = _ranks(f"split/{seed}", map(_prompt_key, examples), len(examples))
    order = np.argsort(ranks, kind="stable")  # rows of one prompt after each other
    starts = np.flatnonzero(np.diff(ranks[order], prepend=~ranks[order[:1]]))
    if len(starts) < 2:
        raise DataError(
            f"A split needs at least two different prompts, got {len(starts)} among {len(examples)} rows. "
            "Add rows, or merge the data set into a larger domain."
        )
    sizes = np.diff(starts, append=len(order))
    chosen = np.zeros(len(starts), dtype=np.bool_)
    room = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    for group, size in enumerate(sizes.tolist()):
        chosen[group] = size <= room
        room -= size if size <= room else 0
    if not chosen.any():
        chosen[sizes.argmin()] = True
    validates = np.empty(len(order), dtype=np.bool_)
    validates[order] = np.repeat(chosen, sizes)
    return np.flatnonzero(~validates), np.flatnonzero(validates)


def _ranks(purpose: str, texts: Iterable[str], count: int) -> NDArray[np.uint64]:
    """For each text a place in an order that looks random, and that other texts do not change."""
    digests = (hashlib.sha256(f"{purpose}/{text}".encode()).digest() for text in texts)
    return np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, count)


def _prompt_key(example: Example) -> str:
    """What keeps examples on one side: all up to the first user's turn, as each answer after it may be learned.

    Texts without a prompt have none in common.
    """
    has_prompt = any(message.content.strip() for message in example.prompt if message.role == "user")
    if not has_prompt:
        return as_json(example.messages)
    first = next(index for index, message in enumerate(example.messages) if message.role == "user")
    return as_json(example.messages[: first + 1])


def as_json(messages: Sequence[Message]) -> str:
    """Messages as one text, for hashes and comparisons."""
    return json.dumps([(message.role, message.content) for message in messages])
