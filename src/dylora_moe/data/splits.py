"""Examples of a domain -> a training and a validation side that share no prompt, and subsets of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dylora_moe.data.cleaning import SIMILARITY, Removed, remove_broken, remove_duplicates, remove_leaks
from dylora_moe.data.example import Example, Message
from dylora_moe.data.sources import LoadedSource
from dylora_moe.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The examples of one domain on their sides, and the rows left out on the way with their reasons."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    removed: tuple[Removed, ...]


def split_domain(domain: str, sources: Sequence[LoadedSource], fraction: float, seed: int) -> Split:
    """Sound and distinct rows; official validation where a source has one, ours for the others."""
    groups = (
        [example for source in sources for example in source.validation or ()],
        [example for source in sources if source.validation for example in source.examples],
        [example for source in sources if not source.validation for example in source.examples],
    )
    # Those for validation first: of two copies on both sides the one for training goes.
    sound = remove_broken([example for group in groups for example in group], part=domain)
    distinct = remove_duplicates(sound.kept, part=domain, similarity=_similarity(sources))
    kept = {id(example) for example in distinct.kept}
    official, official_train, undivided = ([example for example in group if id(example) in kept] for group in groups)
    try:
        train, validation = split_by_prompt(undivided, fraction=fraction, seed=seed) if undivided else ([], [])
    except DataError as error:
        raise DataError(f"Domain {domain!r}: {error}") from error
    return Split(
        train=official_train + train,
        validation=official + validation,
        test=[example for source in sources for example in source.test or ()],
        removed=(*sound.removed, *distinct.removed),
    )


def without_leaks(splits: Mapping[str, Split]) -> dict[str, Split]:
    """The same splits, without training rows whose prompt, or one much like it, is held out in any domain."""
    rows = [example for split in splits.values() for example in split.train]
    held_out = {
        "validation": [example for split in splits.values() for example in split.validation],
        "test": [example for split in splits.values() for example in split.test],
    }
    cleaned = remove_leaks(rows, held_out)
    leaks = {id(removed.example): removed for removed in cleaned.removed}
    found = {}
    for domain, split in splits.items():
        removed = tuple(replace(leaks[id(e)], part=domain) for e in split.train if id(e) in leaks)
        kept = [example for example in split.train if id(example) not in leaks]
        found[domain] = replace(split, train=kept, removed=(*split.removed, *removed))
    return found


def _similarity(sources: Sequence[LoadedSource]) -> float | None:
    """Made examples are as varied as they were meant to be; only copies of them are too many."""
    return None if all(source.where.startswith("synthetic:") for source in sources) else SIMILARITY


def take_subsets(split: Split, training_subset: float | None, eval_subset: float | None, seed: int) -> Split:
    """Keep these percentages of the two sides, all where None; a smaller share is part of a larger one."""
    return replace(
        split,
        train=_subset(split.train, training_subset, seed),
        validation=_subset(split.validation, eval_subset, seed),
    )


def _subset(examples: list[Example], percent: float | None, seed: int) -> list[Example]:
    if percent is None or not examples:
        return examples
    number = max(1, round(len(examples) * percent / 100))
    ranks = [_rank(f"subset/{seed}", _prompt_key(example) + example.answer) for example in examples]
    chosen = sorted(range(len(examples)), key=ranks.__getitem__)[:number]
    return [examples[index] for index in sorted(chosen)]


def split_by_prompt(examples: Sequence[Example], *, fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and validation examples so that no prompt is on both sides.

    The sides depend on the seed and the prompts, not on their order, and both keep the order given.
    Validation has at most `fraction` of the examples, but at least one prompt.

    Raises:
        DataError: There are fewer than two prompts.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_prompt_key(example), []).append(example)
    if len(groups) < 2:
        raise DataError(
            f"A split needs at least two different prompts, got {len(groups)} among {len(examples)} rows. "
            "Add rows, or merge the data set into a larger domain."
        )
    target = max(1, round(len(examples) * fraction))
    target = min(target, len(examples) - 1)
    chosen: set[str] = set()
    num_chosen = 0
    ordered = sorted(groups, key=lambda prompt: _rank(f"split/{seed}", prompt))
    for prompt in ordered:
        if num_chosen + len(groups[prompt]) <= target:
            chosen.add(prompt)
            num_chosen += len(groups[prompt])
    if not chosen:
        chosen = {min(ordered, key=lambda prompt: len(groups[prompt]))}
    train = [example for example in examples if _prompt_key(example) not in chosen]
    return train, [example for example in examples if _prompt_key(example) in chosen]


def _rank(purpose: str, text: str) -> bytes:
    """A place in an order that looks random, and that other rows do not change."""
    return hashlib.sha256(f"{purpose}/{text}".encode()).digest()


def _prompt_key(example: Example) -> str:
    """What keeps examples on one side; texts without a prompt have none in common."""
    has_prompt = any(message.content.strip() for message in example.prompt if message.role == "user")
    return as_json(example.prompt if has_prompt else example.messages)


def as_json(messages: Sequence[Message]) -> str:
    """Messages as one text, for hashes and comparisons."""
    return json.dumps([(message.role, message.content) for message in messages])
