"""Entries of a recipe -> training rows and per-domain validation rows, with a record of what went in."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.example import Example, Message
from dylora_moe.data.sources import (
    DatasetSpec,
    LoadedSource,
    check_path,
    load_examples,
    parse_dataset_spec,
)
from dylora_moe.data.tokenize import IGNORED, Tokenized, fit_to_length, quantile, tokenize_examples
from dylora_moe.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthQuantiles:
    """Tokens a row, over the training and validation rows of a domain."""

    minimum: int
    median: int
    p90: int
    p99: int
    maximum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSummary:
    """What one domain is made of.

    Attributes:
        domain: Its name.
        sources: Where its data sets came from.
        licences: Their SPDX identifiers, None where unknown; each once.
        num_train: Training rows.
        num_validation: Validation rows.
        num_train_tokens: Tokens of the training rows.
        num_train_label_tokens: Those of them that are learned.
        lengths: Tokens a row.
        num_duplicates: Rows left out because prompt and answer were there already.
        num_leaked: Training rows left out because an official validation split has their prompt.
        num_overlong: Rows left out under `overlong: drop`.
        num_bad_rows: Rows left out under `on_bad_row: skip`.
        sha256: Over the conversations used, training rows first.
    """

    domain: str
    sources: tuple[str, ...]
    licences: tuple[str | None, ...]
    num_train: int
    num_validation: int
    num_train_tokens: int
    num_train_label_tokens: int
    lengths: LengthQuantiles
    num_duplicates: int
    num_leaked: int
    num_overlong: int
    num_bad_rows: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What went into a run; `dataclasses.asdict` makes it JSON."""

    domains: tuple[DomainSummary, ...]
    seed: int
    max_length: int
    end_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBundle:
    """All that training and its validation read.

    Attributes:
        train: Training rows of all domains, domain after domain; the sampler mixes them.
        validation: Validation rows by domain.
        validation_examples: The examples behind `validation`, in the same order.
        domains: Their names; a row's `domain` is an index into this.
        end_token_ids: Generation stops on these.
        summary: What went in.
    """

    train: list[TokenizedRow]
    validation: dict[str, list[TokenizedRow]]
    validation_examples: dict[str, list[Example]]
    domains: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    summary: DataSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """The examples of one domain on their two sides, and how many were left out on the way."""

    train: list[Example]
    validation: list[Example]
    num_duplicates: int
    num_leaked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One side of a domain's split after tokenising: examples and rows in the same order."""

    examples: list[Example]
    rows: list[TokenizedRow]


def build_data(
    datasets: Sequence[str | Mapping[str, object] | DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Literal["error", "drop"] = "error",
    validation_split: float = 0.1,
    training_subset: float | None = None,
    eval_subset: float | None = None,
    seed: int = 0,
) -> DataBundle:
    """Load, split and tokenise the data of a run. Without a chat template the tokenizer is given one.

    Args:
        datasets: Entries of a recipe; those of one domain are merged.
        tokenizer: Of the base.
        max_length: The most tokens a row may have.
        overlong: What to do about longer rows: `error` or `drop`; they are never cut.
        validation_split: Fraction of the rows to validate on, where there is no official split.
        training_subset: Percent of the training rows to use; a smaller share is part of a larger one.
        eval_subset: Percent of the validation rows to use.
        seed: Decides splits, subsets and synthetic examples.

    Raises:
        DataError: Nothing to train on, a bad file or row, a row too long, or a domain too small to split.
    """
    _check_settings(validation_split, training_subset, eval_subset, max_length, overlong)
    loaded = _load_by_domain(datasets, seed=seed)
    splits = {
        domain: _take_subsets(
            _split_domain(domain, sources, validation_split, seed), training_subset, eval_subset, seed
        )
        for domain, sources in loaded.items()
    }
    tokenized = {
        domain: tokenize_examples([*split.train, *split.validation], tokenizer) for domain, split in splits.items()
    }
    # Over all domains, so that one error tells the length that fits them all.
    all_rows = [row for rows in tokenized.values() for row in rows.rows]
    fit_to_length(all_rows, max_length=max_length, overlong=overlong)
    sides = {
        domain: _sides(domain, index, split, tokenized[domain].rows, max_length)
        for index, (domain, split) in enumerate(splits.items())
    }
    end_token_ids = tuple(sorted({token for rows in tokenized.values() for token in rows.end_token_ids}))
    return DataBundle(
        train=[row for train, _ in sides.values() for row in train.rows],
        validation={domain: validation.rows for domain, (_, validation) in sides.items()},
        validation_examples={domain: validation.examples for domain, (_, validation) in sides.items()},
        domains=tuple(sides),
        end_token_ids=end_token_ids,
        summary=DataSummary(
            domains=tuple(_summarise(name, loaded[name], splits[name], *sides[name]) for name in sides),
            seed=seed,
            max_length=max_length,
            end_token_ids=end_token_ids,
        ),
    )


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


def _check_settings(
    validation_split: float,
    training_subset: float | None,
    eval_subset: float | None,
    max_length: int,
    overlong: str,
) -> None:
    if not 0 < validation_split < 1:
        raise DataError(
            f"validation_split must be a fraction between 0 and 1, both excluded, got {validation_split}. "
            "Every domain is validated; 0.1 is usual."
        )
    for name, percent in (("training_subset", training_subset), ("eval_subset", eval_subset)):
        if percent is not None and not 0 < percent <= 100:
            raise DataError(f"{name} must be a percentage above 0 and up to 100, got {percent}.")
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {max_length}.")
    if overlong not in ("error", "drop"):
        raise DataError(f"overlong must be error or drop, got {overlong!r}.")


def _load_by_domain(
    datasets: Sequence[str | Mapping[str, object] | DatasetSpec], *, seed: int
) -> dict[str, list[LoadedSource]]:
    if isinstance(datasets, str) or not datasets:
        raise DataError(
            f"datasets must be a list of at least one name, path or mapping, got {datasets!r}. "
            "For instance: [requests, stripe, flask]."
        )
    specs = [parse_dataset_spec(value) for value in datasets]
    for spec in specs:
        check_path(spec)
    by_domain: dict[str, list[LoadedSource]] = {}
    for spec in specs:
        source = load_examples(spec, seed=seed)
        by_domain.setdefault(source.domain, []).append(source)
    return by_domain


def _split_domain(domain: str, sources: Sequence[LoadedSource], fraction: float, seed: int) -> _Split:
    """Official validation where a source has one, ours for the others; no prompt on both sides."""
    groups = (
        [example for source in sources for example in source.validation or ()],
        [example for source in sources if source.validation for example in source.examples],
        [example for source in sources if not source.validation for example in source.examples],
    )
    seen: set[tuple[str, str]] = set()
    official, official_train, undivided = (_without_duplicates(group, seen) for group in groups)
    try:
        train, validation = split_by_prompt(undivided, fraction=fraction, seed=seed) if undivided else ([], [])
    except DataError as error:
        raise DataError(f"Domain {domain!r}: {error}") from error
    validation = official + validation
    prompts = {_prompt_key(example) for example in validation}
    candidates = official_train + train
    kept = [example for example in candidates if _prompt_key(example) not in prompts]
    return _Split(
        train=kept,
        validation=validation,
        num_duplicates=sum(map(len, groups)) - len(seen),
        num_leaked=len(candidates) - len(kept),
    )


def _without_duplicates(examples: Iterable[Example], seen: set[tuple[str, str]]) -> list[Example]:
    """The examples whose prompt and answer are not in `seen`, which grows by them."""
    kept = []
    for example in examples:
        key = (_prompt_key(example), example.answer)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def _take_subsets(split: _Split, training_subset: float | None, eval_subset: float | None, seed: int) -> _Split:
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


def _rank(purpose: str, text: str) -> bytes:
    """A place in an order that looks random, and that other rows do not change."""
    return hashlib.sha256(f"{purpose}/{text}".encode()).digest()


def _prompt_key(example: Example) -> str:
    return _as_json(example.prompt)


def _as_json(messages: Sequence[Message]) -> str:
    return json.dumps([(message.role, message.content) for message in messages])


def _sides(domain: str, index: int, split: _Split, rows: Sequence[Tokenized], max_length: int) -> tuple[_Side, _Side]:
    """Training and validation side without the rows that are too long."""
    border = len(split.train)
    train = _side(split.train, rows[:border], index, max_length)
    validation = _side(split.validation, rows[border:], index, max_length)
    for name, side in (("training", train), ("validation", validation)):
        if not side.rows:
            raise DataError(
                f"Domain {domain!r} must have at least one {name} row, got none of {len(rows)} rows within "
                f"max_length={max_length}. Raise max_length, add rows, or leave the domain out."
            )
    return train, validation


def _side(examples: Sequence[Example], rows: Sequence[Tokenized], domain: int, max_length: int) -> _Side:
    kept = fit_to_length(rows, max_length=max_length, overlong="drop")
    return _Side(
        examples=[examples[index] for index in kept],
        rows=[
            TokenizedRow(input_ids=rows[index].input_ids, labels=rows[index].labels, domain=domain) for index in kept
        ],
    )


def _summarise(
    domain: str, sources: Sequence[LoadedSource], split: _Split, train: _Side, validation: _Side
) -> DomainSummary:
    lengths = sorted(len(row) for row in (*train.rows, *validation.rows))
    digest = hashlib.sha256()
    for example in (*train.examples, *validation.examples):
        digest.update(_as_json(example.messages).encode())
    return DomainSummary(
        domain=domain,
        sources=tuple(source.where for source in sources),
        licences=tuple(dict.fromkeys(source.licence for source in sources)),
        num_train=len(train.rows),
        num_validation=len(validation.rows),
        num_train_tokens=sum(len(row) for row in train.rows),
        num_train_label_tokens=sum(label != IGNORED for row in train.rows for label in row.labels),
        lengths=LengthQuantiles(
            minimum=lengths[0],
            median=quantile(lengths, 0.5),
            p90=quantile(lengths, 0.9),
            p99=quantile(lengths, 0.99),
            maximum=lengths[-1],
        ),
        num_duplicates=split.num_duplicates,
        num_leaked=split.num_leaked,
        num_overlong=len(split.train) + len(split.validation) - len(lengths),
        num_bad_rows=sum(source.num_bad_rows for source in sources),
        sha256=digest.hexdigest(),
    )
