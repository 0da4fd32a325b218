"""Entries of a recipe -> training rows and per-domain validation rows, with a record of what went in."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from transformers import PreTrainedTokenizerBase

from dylora_moe.config import DatasetSpec, RunConfig
from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.cleaning import Removed, count_reasons
from dylora_moe.data.example import Example
from dylora_moe.data.registry import REGISTRY, DataSource, registry_of
from dylora_moe.data.sampler import make_sampler
from dylora_moe.data.sources import (
    BadRow,
    FoundFormat,
    LoadedSource,
    check_path,
    load_examples,
    parse_dataset_spec,
)
from dylora_moe.data.splits import Split, as_json, split_domain, take_subsets, without_leaks
from dylora_moe.data.tokenize import (
    Fitted,
    Learn,
    Overlong,
    Tokenized,
    fit_to_length,
    quantile,
    tokenize_examples,
)
from dylora_moe.errors import DataError

_HISTOGRAM_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthQuantiles:
    """Tokens a row, over the training and validation rows of a domain.

    Attributes:
        minimum: Of the shortest row.
        median: Of the row in the middle.
        p90: What 90 % of the rows do not exceed.
        p99: What 99 % of the rows do not exceed.
        maximum: Of the longest row.
        histogram: Rows in each of 16 equal steps from 0 to the maximum.
    """

    minimum: int
    median: int
    p90: int
    p99: int
    maximum: int
    histogram: tuple[int, ...]


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
        formats: What the rows were read as, and whether that was given or found by their columns.
        num_filtered: Rows that a filter of the registry leaves out.
        num_test: Rows of an official test split, which nothing here reads.
        num_unused: Rows of official splits that are for neither training, validation nor test.
        removed: Rows left out by each rule of `data.cleaning`.
        num_overlong: Rows left out for their length.
        num_cut: Longer rows of which the beginning was kept, or that became several.
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
    formats: tuple[str, ...]
    num_filtered: int
    num_test: int
    num_unused: int
    removed: dict[str, int]
    num_overlong: int
    num_cut: int
    num_bad_rows: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSummary:
    """What an epoch is made of.

    Attributes:
        num_batches: In an epoch.
        fill_rate: Share of the first epoch's tokens that are no padding.
    """

    num_batches: int
    fill_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What went into a run; `dataclasses.asdict` makes it JSON. Batches are those of a run, None without one."""

    domains: tuple[DomainSummary, ...]
    seed: int
    max_length: int
    end_token_ids: tuple[int, ...]
    batches: BatchSummary | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBundle:
    """All that training and its validation read.

    Attributes:
        train: Training rows of all domains, domain after domain; the sampler mixes them.
        validation: Validation rows by domain.
        validation_examples: The examples behind `validation`, in the same order.
        domains: Their names; a row's `domain` is an index into this.
        end_token_ids: Generation stops on these.
        bad_rows: Rows that could not be read, by domain.
        removed: Rows left out by cleaning, by domain.
        summary: What went in.
    """

    train: list[TokenizedRow]
    validation: dict[str, list[TokenizedRow]]
    validation_examples: dict[str, list[Example]]
    domains: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    bad_rows: dict[str, tuple[BadRow, ...]]
    removed: dict[str, tuple[Removed, ...]]
    summary: DataSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One side of a domain's split after tokenising: examples and rows in the same order."""

    examples: list[Example]
    rows: list[TokenizedRow]
    fitted: Fitted


def build_data(
    datasets: Sequence[str | Mapping[str, object] | DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    registry: Mapping[str, DataSource] = REGISTRY,
    max_length: int,
    overlong: Overlong = "error",
    learn: Learn = "answers",
    validation_split: float = 0.1,
    training_subset: float | None = None,
    eval_subset: float | None = None,
    seed: int = 0,
) -> DataBundle:
    """Load, split and tokenise the data of a run. Without a chat template the tokenizer is given one.

    Args:
        datasets: Entries of a recipe; those of one domain are merged.
        tokenizer: Of the base.
        registry: What names of data sets mean.
        max_length: The most tokens a row may have.
        overlong: What becomes of longer rows: `error`, `drop`, `truncate` or `split`.
        learn: Which tokens are labels: every answer of a conversation, its last answer, or all of its text.
        validation_split: Fraction of the rows to validate on, where there is no official split.
        training_subset: Percent of the training rows to use; a smaller share is part of a larger one.
        eval_subset: Percent of the validation rows to use.
        seed: Decides splits, subsets and synthetic examples.

    Raises:
        DataError: Nothing to train on, a bad file or row, a row too long, or a domain too small to split.
    """
    _check_settings(validation_split, training_subset, eval_subset, max_length, overlong)
    loaded = _load_by_domain(datasets, registry, seed=seed)
    whole = without_leaks(
        {domain: split_domain(domain, sources, validation_split, seed) for domain, sources in loaded.items()}
    )
    splits = {domain: take_subsets(split, training_subset, eval_subset, seed) for domain, split in whole.items()}
    tokenized = {
        domain: tokenize_examples([*split.train, *split.validation], tokenizer, learn=learn)
        for domain, split in splits.items()
    }
    if overlong == "error":  # over all domains, so that one error tells the length that fits them all
        fit_to_length(
            [row for rows in tokenized.values() for row in rows.rows], max_length=max_length, overlong="error"
        )
    sides = {
        domain: _sides(domain, index, split, tokenized[domain].rows, max_length, overlong)
        for index, (domain, split) in enumerate(splits.items())
    }
    end_token_ids = tuple(sorted({token for rows in tokenized.values() for token in rows.end_token_ids}))
    return DataBundle(
        train=[row for train, _ in sides.values() for row in train.rows],
        validation={domain: validation.rows for domain, (_, validation) in sides.items()},
        validation_examples={domain: validation.examples for domain, (_, validation) in sides.items()},
        domains=tuple(sides),
        end_token_ids=end_token_ids,
        bad_rows={domain: tuple(bad for source in loaded[domain] for bad in source.bad_rows) for domain in sides},
        removed={domain: split.removed for domain, split in splits.items()},
        summary=DataSummary(
            domains=tuple(_summarise(name, loaded[name], splits[name], *sides[name]) for name in sides),
            seed=seed,
            max_length=max_length,
            end_token_ids=end_token_ids,
        ),
    )


def build_run_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> DataBundle:
    """`build_data` with the settings of a run, which also decide its batches.

    Raises:
        DataError: As `build_data` and `make_sampler`.
    """
    data = build_data(
        config.datasets,
        tokenizer,
        registry=registry_of(config.data_registry),
        max_length=config.max_length,
        overlong=config.overlong,
        learn=config.learn,
        validation_split=config.validation_split,
        training_subset=config.training_subset,
        eval_subset=config.eval_subset,
        seed=config.seed,
    )
    sampler = make_sampler(config, data.train, data.domains)
    batches = BatchSummary(num_batches=sampler.num_batches, fill_rate=sampler.fill_rate())
    return replace(data, summary=replace(data.summary, batches=batches))


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
    if overlong not in get_args(Overlong):
        raise DataError(f"overlong must be one of {', '.join(get_args(Overlong))}, got {overlong!r}.")


def _load_by_domain(
    datasets: Sequence[str | Mapping[str, object] | DatasetSpec], registry: Mapping[str, DataSource], *, seed: int
) -> dict[str, list[LoadedSource]]:
    if isinstance(datasets, str) or not datasets:
        raise DataError(
            f"datasets must be a list of at least one name, path or mapping, got {datasets!r}. "
            "For instance: [requests, stripe, flask]."
        )
    specs = [parse_dataset_spec(value, registry) for value in datasets]
    for spec in specs:
        check_path(spec, registry)
    by_domain: dict[str, list[LoadedSource]] = {}
    for spec in specs:
        source = load_examples(spec, seed=seed, registry=registry)
        if source.domain in by_domain and spec.domain is None:
            other = by_domain[source.domain][0].where
            raise DataError(
                f"Data sets of one domain must say so, got {other} and {source.where}, which would both be the domain "
                f"{source.domain!r} by their names. Give each entry a domain; those with the same one are merged."
            )
        by_domain.setdefault(source.domain, []).append(source)
    return by_domain


def _sides(
    domain: str, index: int, split: Split, rows: Sequence[Tokenized], max_length: int, overlong: Overlong
) -> tuple[_Side, _Side]:
    """Training and validation side, of rows that fit."""
    border = len(split.train)
    train = _side(split.train, rows[:border], index, max_length, overlong)
    validation = _side(split.validation, rows[border:], index, max_length, overlong)
    for name, side in (("training", train), ("validation", validation)):
        if not side.rows:
            raise DataError(
                f"Domain {domain!r} must have at least one {name} row, got none of {len(rows)} rows within "
                f"max_length={max_length}. Raise max_length, add rows, or leave the domain out."
            )
    return train, validation


def _side(
    examples: Sequence[Example], rows: Sequence[Tokenized], domain: int, max_length: int, overlong: Overlong
) -> _Side:
    fitted = fit_to_length(rows, max_length=max_length, overlong=overlong)
    return _Side(
        examples=[examples[index] for index, _ in fitted.rows],
        rows=[TokenizedRow(input_ids=row.input_ids, labels=row.labels, domain=domain) for _, row in fitted.rows],
        fitted=fitted,
    )


def _summarise(
    domain: str, sources: Sequence[LoadedSource], split: Split, train: _Side, validation: _Side
) -> DomainSummary:
    lengths = sorted(len(row) for row in (*train.rows, *validation.rows))
    digest = hashlib.sha256()
    for example in (*train.examples, *validation.examples):
        digest.update(as_json(example.messages).encode())
    return DomainSummary(
        domain=domain,
        sources=tuple(source.where for source in sources),
        licences=tuple(dict.fromkeys(source.licence for source in sources)),
        num_train=len(train.rows),
        num_validation=len(validation.rows),
        num_train_tokens=sum(len(row) for row in train.rows),
        num_train_label_tokens=sum(row.num_labels for _, row in train.fitted.rows),
        lengths=LengthQuantiles(
            minimum=lengths[0],
            median=quantile(lengths, 0.5),
            p90=quantile(lengths, 0.9),
            p99=quantile(lengths, 0.99),
            maximum=lengths[-1],
            histogram=_histogram(lengths),
        ),
        formats=tuple(dict.fromkeys(_describe(found) for source in sources for found in source.formats)),
        num_filtered=sum(source.num_filtered for source in sources),
        num_test=len(split.test),
        num_unused=sum(source.num_unused for source in sources),
        removed={str(reason): number for reason, number in count_reasons(split.removed).items()},
        num_overlong=train.fitted.num_dropped + validation.fitted.num_dropped,
        num_cut=train.fitted.num_cut + validation.fitted.num_cut,
        num_bad_rows=sum(source.num_bad_rows for source in sources),
        sha256=digest.hexdigest(),
    )


def _describe(found: FoundFormat) -> str:
    return f"{found.format} ({'given' if found.given else 'by columns ' + ', '.join(found.columns)})"


def _histogram(lengths: Sequence[int]) -> tuple[int, ...]:
    """How many of the ordered lengths lie in each of equal steps from 0 to the largest."""
    counts = [0] * _HISTOGRAM_STEPS
    for length in lengths:
        counts[-(-length * _HISTOGRAM_STEPS // lengths[-1]) - 1] += 1
    return tuple(counts)
