"""Examples of a domain -> a training and a validation side that share no prompt, and subsets of them.

Examples are named by their places in one list of them all, which is read one example at a time.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set that was read: what is known of it, and the places of the examples of its official splits.

    `num_unused` counts the examples of splits that are for neither training, validation nor test.
    """

    record: SourceRecord
    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]
    num_unused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """An example that cleaning removed; `other` is the place of the one that it is too much like."""

    place: int
    reason: Reason
    detail: str
    other: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Places of the examples of one domain on their sides, and those left out on the way with their reasons."""

    train: list[int]
    validation: list[int]
    test: list[int]
    removed: tuple[LeftOut, ...]


def split_domain(
    domain: str, examples: Stored[Example], sources: Sequence[Source], fraction: float, seed: int
) -> Split:
    """Sound and distinct rows; official validation where a source has one, ours for the others.

    Raises:
        DataError: There are too few prompts to split.
    """
    official = [place for source in sources for place in source.validation]
    official_train = [place for source in sources if source.validation for place in source.train]
    undivided = [place for source in sources if not source.validation for place in source.train]
    # Those for validation first: of two copies on both sides the one for training goes.
    places = [*official, *official_train, *undivided]
    cleaned = remove_broken(examples.take(places))
    removed = _left_out(places, cleaned, {})
    places = [places[index] for index in cleaned.kept]
    cleaned = remove_duplicates(examples.take(places), similarity=_similarity(sources))
    removed += _left_out(places, cleaned, {"": places})
    kept = {places[index] for index in cleaned.kept}
    official, official_train, undivided = (
        [place for place in group if place in kept] for group in (official, official_train, undivided)
    )
    train: list[int] = []
    validation: list[int] = []
    if undivided:
        try:
            train, validation = split_by_prompt(examples.take(undivided), fraction=fraction, seed=seed)
        except DataError as error:
            raise DataError(f"Domain {domain!r}: {error}") from error
    return Split(
        train=official_train + [undivided[index] for index in train],
        validation=official + [undivided[index] for index in validation],
        test=[place for source in sources for place in source.test],
        removed=tuple(removed),
    )


def without_leaks(examples: Stored[Example], splits: Mapping[str, Split]) -> dict[str, Split]:
    """The same splits, without training rows whose prompt, or one much like it, is held out in any domain."""
    places = [place for split in splits.values() for place in split.train]
    held_out = {
        "validation": [place for split in splits.values() for place in split.validation],
        "test": [place for split in splits.values() for place in split.test],
    }
    cleaned = remove_leaks(examples.take(places), {name: examples.take(held) for name, held in held_out.items()})
    leaks = {left.place: left for left in _left_out(places, cleaned, held_out)}
    return {
        domain: replace(
            split,
            train=[place for place in split.train if place not in leaks],
            removed=(*split.removed, *(leaks[place] for place in split.train if place in leaks)),
        )
        for domain, split in splits.items()
    }


def _left_out(places: Sequence[int], cleaned: Cleaned, lists: Mapping[str, Sequence[int]]) -> list[LeftOut]:
    def name(removed: Removed) -> LeftOut:
        other = None if removed.other is None else lists[removed.other[0]][removed.other[1]]
        return LeftOut(place=places[removed.index], reason=removed.reason, detail=removed.detail, other=other)

    return [name(removed) for removed in cleaned.removed]


def _similarity(sources: Sequence[Source]) -> float | None:
    """Made examples are as varied as they were meant to be; only copies of them are too many."""
    return None if all(source.record.is_synthetic for source in sources) else SIMILARITY


def take_subsets(
    examples: Stored[Example], split: Split, training_subset: float | None, eval_subset: float | None, seed: int
) -> Split:
    """Keep these percentages of the two sides, all where None; a smaller share is part of a larger one."""
    return replace(
        split,
        train=_subset(examples, split.train, training_subset, seed),
        validation=_subset(examples, split.validation, eval_subset, seed),
    )


def _subset(examples: Stored[Example], places: list[int], percent: float | None, seed: int) -> list[int]:
    if percent is None or not places:
        return places
    number = max(1, round(len(places) * percent / 100))
    ranks = [_rank(f"subset/{seed}", _prompt_key(example) + example.answer) for example in examples.take(places)]
    chosen = sorted(range(len(places)), key=ranks.__getitem__)[:number]
    return [places[index] for index in sorted(chosen)]


def split_by_prompt(examples: Sequence[Example], *, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of training and of validation examples, such that no prompt is on both sides.

    The sides depend on the seed and the prompts, not on their order, and both keep the order given.
    Validation has at most `fraction` of the examples, but at least one prompt.

    Raises:
        DataError: There are fewer than two prompts.
    """
    groups: dict[bytes, list[int]] = {}
    for place, example in enumerate(examples):
        groups.setdefault(_rank(f"split/{seed}", _prompt_key(example)), []).append(place)
    if len(groups) < 2:
        raise DataError(
            f"A split needs at least two different prompts, got {len(groups)} among {len(examples)} rows. "
            "Add rows, or merge the data set into a larger domain."
        )
    target = max(1, round(len(examples) * fraction))
    target = min(target, len(examples) - 1)
    chosen: list[int] = []
    ordered = sorted(groups)
    for prompt in ordered:
        if len(chosen) + len(groups[prompt]) <= target:
            chosen += groups[prompt]
    validation = set(chosen or groups[min(ordered, key=lambda prompt: len(groups[prompt]))])
    return [place for place in range(len(examples)) if place not in validation], sorted(validation)


def _rank(purpose: str, text: str) -> bytes:
    """A place in an order that looks random, and that other rows do not change."""
    return hashlib.sha256(f"{purpose}/{text}".encode()).digest()


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
