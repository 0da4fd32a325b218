"""Data sets of a recipe -> a folder with tokenised rows, their validation examples, what was left out, and a summary.

Reads, cleans, splits and tokenises one example after the other: less than 1 kB is held in memory for each.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from dylora_moe.config import DatasetSpec
from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.example import Example
from dylora_moe.data.readers import BadRow
from dylora_moe.data.registry import DataSource
from dylora_moe.data.sources import FoundFormat, SplitExample, draw_rows, read_source
from dylora_moe.data.splits import LeftOut, Source, Split, as_json, split_domain, take_subsets, without_leaks
from dylora_moe.data.stored import EXAMPLES, ROWS, Rows, Stored, Writer, open_examples, open_places, open_rows
from dylora_moe.data.summary import DataSummary, DomainSummary, summarise_lengths
from dylora_moe.data.tokenize import Fitted, Learn, Overlong, check_lengths, fit_to_length, tokenize_examples
from dylora_moe.errors import DataError

REMOVED_FILE = "removed.jsonl"
_ROWS_FILE, _EXAMPLES_FILE, _SUMMARY_FILE = "rows.arrow", "examples.arrow", "summary.json"
_COLUMNS = ("lengths", "domains", "sides")
_CHUNK = 256  # examples tokenised together
_MANY = 20_000  # examples that take a while to clean
_SECONDS = 5.0  # between two lines of progress

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """How data sets become rows; see `build_data`."""

    max_length: int
    overlong: Overlong
    learn: Learn
    validation_split: float
    training_subset: float | None
    eval_subset: float | None
    seed: int


@dataclass(slots=True, kw_only=True)
class _Side:
    """What became of one side of a domain."""

    lengths: list[int] = field(default_factory=list)
    num_labels: int = 0
    num_ends: int = 0  # rows that teach where an answer ends
    num_dropped: int = 0
    num_cut: int = 0


class _Clock:
    """Tells a line now and then while work goes on."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._last = tell, time.monotonic()

    def tick(self, line: str, number: int) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS:
            self._tell(line.format(f"{number:,}"))
            self._last = now


class _Log:
    """The file of rows that were left out, with their reasons."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add_bad(self, domain: str, bad: BadRow) -> None:
        self._add(domain=domain, where=bad.where, reason=bad.reason, row=bad.row)

    def add(self, domain: str, where: str, example: Example, reason: str) -> None:
        messages = [asdict(message) for message in example.messages]
        self._add(domain=domain, where=where, reason=reason, row=messages)

    def _add(self, **record: Any) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def prepare_data(
    specs: Sequence[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    registry: Mapping[str, DataSource],
    settings: DataSettings,
    *,
    scratch: Path,
    result: Path,
    tell: Tell,
) -> None:
    """Fill the folder `result`, with the help of the empty folder `scratch`.

    Raises:
        DataError: As `build_data`.
    """
    clock = _Clock(tell)
    with (result / REMOVED_FILE).open("w", encoding="utf-8", errors="backslashreplace") as file:
        log = _Log(file)
        examples, sources = _read(specs, registry, settings.seed, scratch / _EXAMPLES_FILE, log, clock)
        splits = _split(examples, sources, settings, tell)
        wheres = open_places(scratch / _EXAMPLES_FILE)
        for domain, split in splits.items():
            for left in split.removed:
                other = "" if left.other is None else f" {wheres[left.other]}"
                reason = f"{left.reason}: {left.detail}{other}"
                log.add(domain, wheres[left.place], examples[left.place], reason)
        _tokenise(examples, wheres, sources, splits, tokenizer, settings, result, log, clock)


def _read(
    specs: Sequence[DatasetSpec], registry: Mapping[str, DataSource], seed: int, path: Path, log: _Log, clock: _Clock
) -> tuple[Stored[Example], dict[str, list[Source]]]:
    """All examples into one file, and which of them each data set gave."""
    by_domain: dict[str, list[Source]] = {}
    with Writer(path, EXAMPLES) as writer:
        for spec in specs:
            source = _read_one(spec, registry, seed, writer, log, clock)
            domain = source.record.domain
            if domain in by_domain and spec.domain is None:
                other = by_domain[domain][0].record.where
                raise DataError(
                    f"Data sets of one domain must say so, got {other} and {source.record.where}, which would both be "
                    f"the domain {domain!r} by their names. Give each entry a domain; those with the same one are "
                    "merged."
                )
            by_domain.setdefault(domain, []).append(source)
    return open_examples(path), by_domain


def _read_one(
    spec: DatasetSpec, registry: Mapping[str, DataSource], seed: int, writer: Writer, log: _Log, clock: _Clock
) -> Source:
    places: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    num_unused = 0

    def add(item: SplitExample) -> None:
        nonlocal num_unused
        if item.split == "unused":
            num_unused += 1
            return
        places[item.split].append(len(writer))
        writer.add_example(item.example, item.where)
        clock.tick("reading: {} examples", len(writer))

    record = read_source(spec, seed=seed, registry=registry, add=add, on_bad=log.add_bad)
    train = places["train"]
    chosen = train if record.is_synthetic else [train[index] for index in draw_rows(spec, len(train), seed=seed)]
    return Source(
        record=record, train=chosen, validation=places["validation"], test=places["test"], num_unused=num_unused
    )


def _split(
    examples: Stored[Example], sources: Mapping[str, Sequence[Source]], settings: DataSettings, tell: Tell
) -> dict[str, Split]:
    if len(examples) > _MANY:
        tell(f"cleaning {len(examples):,} examples")
    splits = {
        domain: split_domain(domain, examples, parts, settings.validation_split, settings.seed)
        for domain, parts in sources.items()
    }
    return {
        domain: take_subsets(examples, split, settings.training_subset, settings.eval_subset, settings.seed)
        for domain, split in without_leaks(examples, splits).items()
    }


def _tokenise(
    examples: Stored[Example],
    wheres: Stored[str],
    sources: Mapping[str, Sequence[Source]],
    splits: Mapping[str, Split],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    result: Path,
    log: _Log,
    clock: _Clock,
) -> None:
    """Write the rows of all domains, each domain's training rows first, with their validation examples."""
    total = sum(len(split.train) + len(split.validation) for split in splits.values())
    all_lengths: list[int] = []
    written: list[tuple[int, int, int]] = []  # length, domain and side of each row
    summaries: list[DomainSummary] = []
    end_token_ids: set[int] = set()
    with Writer(result / _ROWS_FILE, ROWS) as rows, Writer(result / _EXAMPLES_FILE, EXAMPLES) as validated:
        for index, (domain, split) in enumerate(splits.items()):
            sides = (_Side(), _Side())
            digest = hashlib.sha256()
            for number, (side, places) in enumerate(zip(sides, (split.train, split.validation), strict=True)):
                digest.update(f"side {number}".encode())
                for start in range(0, len(places), _CHUNK):
                    chunk = list(examples.take(places[start : start + _CHUNK]))
                    tokenized = tokenize_examples(chunk, tokenizer, learn=settings.learn)
                    end_token_ids.update(tokenized.end_token_ids)
                    all_lengths += [len(row) for row in tokenized.rows]
                    # Too long a row stops below, where the lengths of all rows are known.
                    fitted = (
                        Fitted(rows=tuple(enumerate(tokenized.rows)))
                        if settings.overlong == "error"
                        else fit_to_length(tokenized.rows, max_length=settings.max_length, overlong=settings.overlong)
                    )
                    for place, row in fitted.rows:
                        rows.add_row(TokenizedRow(input_ids=row.input_ids, labels=row.labels, domain=index))
                        written.append((len(row), index, number))
                        side.lengths.append(len(row))
                        side.num_labels += row.num_labels
                        side.num_ends += row.labels[-1] in tokenized.end_token_ids
                        digest.update(as_json(chunk[place].messages).encode())
                        if number:
                            validated.add_example(chunk[place])
                    side.num_dropped += fitted.num_dropped
                    side.num_cut += fitted.num_cut
                    for place in sorted(set(range(len(chunk))) - {place for place, _ in fitted.rows}):
                        length = len(tokenized.rows[place])
                        reason = f"overlong: {length} tokens, max_length is {settings.max_length}"
                        log.add(domain, wheres[places[start + place]], chunk[place], reason)
                    clock.tick(f"tokenising: {{}} of {total:,} examples", len(all_lengths))
            _check_sides(domain, sides, split, settings.max_length)
            summaries.append(_summarise(domain, sources[domain], split, *sides, digest.hexdigest()))
    if settings.overlong == "error":
        check_lengths(all_lengths, settings.max_length)
    for name, column in zip(_COLUMNS, np.array(written, dtype=np.int32).T, strict=True):
        np.save(result / f"{name}.npy", column, allow_pickle=False)
    summary = DataSummary(
        domains=tuple(summaries),
        seed=settings.seed,
        max_length=settings.max_length,
        end_token_ids=tuple(sorted(end_token_ids)),
    )
    (result / _SUMMARY_FILE).write_text(json.dumps(asdict(summary)), encoding="utf-8")


def _check_sides(domain: str, sides: tuple[_Side, _Side], split: Split, max_length: int) -> None:
    for name, side, places in zip(("training", "validation"), sides, (split.train, split.validation), strict=True):
        if side.num_ends:
            continue
        if side.lengths:
            raise DataError(
                f"Domain {domain!r} must have {name} rows that teach where an answer ends, got none of "
                f"{len(side.lengths)}: all are cut at max_length={max_length} tokens. Raise it, or set overlong: drop."
            )
        if places:
            found = f"none of {len(places)} within max_length={max_length}. Raise max_length"
        else:
            reasons = ", ".join(f"{number} {reason}" for reason, number in _count_reasons(split.removed).items())
            found = f"none after cleaning, which left out {reasons or 'no row'}. Mend these rows"
        raise DataError(f"Domain {domain!r} must have at least one {name} row, got {found}, add rows, or leave it out.")


def _summarise(
    domain: str, sources: Sequence[Source], split: Split, train: _Side, validation: _Side, sha256: str
) -> DomainSummary:
    records = [source.record for source in sources]
    return DomainSummary(
        domain=domain,
        sources=tuple(record.where for record in records),
        licences=tuple(dict.fromkeys(record.licence for record in records)),
        num_train=len(train.lengths),
        num_validation=len(validation.lengths),
        num_train_tokens=sum(train.lengths),
        num_train_label_tokens=train.num_labels,
        lengths=summarise_lengths(np.array([*train.lengths, *validation.lengths])),
        formats=tuple(dict.fromkeys(_describe(found) for record in records for found in record.formats)),
        num_filtered=sum(record.num_filtered for record in records),
        num_test=len(split.test),
        num_unused=sum(source.num_unused for source in sources),
        removed=_count_reasons(split.removed),
        num_overlong=train.num_dropped + validation.num_dropped,
        num_cut=train.num_cut + validation.num_cut,
        num_bad_rows=sum(record.num_bad_rows for record in records),
        sha256=sha256,
    )


def _count_reasons(removed: Sequence[LeftOut]) -> dict[str, int]:
    return {str(reason): number for reason, number in Counter(left.reason for left in removed).items()}


def _describe(found: FoundFormat) -> str:
    return f"{found.format} ({'given' if found.given else 'by columns ' + ', '.join(found.columns)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a folder of `prepare_data` holds: training rows, validation rows and examples by domain, a summary."""

    train: Rows
    validation: dict[str, Rows]
    validation_examples: dict[str, Stored[Example]]
    summary: DataSummary


def open_prepared(folder: Path) -> Prepared:
    """Read a folder that `prepare_data` filled; its rows are read when they are asked for."""
    rows, examples = open_rows(folder / _ROWS_FILE), open_examples(folder / _EXAMPLES_FILE)
    lengths, domains, sides = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in _COLUMNS)
    summary = TypeAdapter(DataSummary).validate_json((folder / _SUMMARY_FILE).read_bytes())

    def choose(chosen: Any) -> Rows:
        places = np.flatnonzero(chosen)
        return Rows(rows.take(places), lengths[places], domains[places])

    validated = domains[sides == 1]
    names = [domain.domain for domain in summary.domains]
    return Prepared(
        train=choose(sides == 0),
        validation={name: choose((sides == 1) & (domains == index)) for index, name in enumerate(names)},
        validation_examples={
            name: examples.take(np.flatnonzero(validated == index)) for index, name in enumerate(names)
        },
        summary=summary,
    )
