"""Data sets of a recipe -> a folder with tokenised rows, examples held out, what was left out, and a summary.

Reads, cleans, splits and tokenises one example after the other: about 100 bytes are held in memory for each.
"""

import hashlib
import json
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from dylora_moe.config import DatasetSpec
from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.bundle import COLUMNS, EXAMPLES_FILE, REMOVED_FILE, ROWS_FILE, SIDES, SUMMARY_FILE
from dylora_moe.data.example import Example
from dylora_moe.data.readers import BadRow
from dylora_moe.data.registry import DataSource
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.sources import FoundFormat, SplitExample, draw_rows, read_source
from dylora_moe.data.splits import LeftOut, Places, Source, Split, as_json, split_domain, take_subsets, without_leaks
from dylora_moe.data.stored import EXAMPLES, ROWS, Stored, Writer, open_examples, open_wheres
from dylora_moe.data.summary import DataSummary, DomainSummary, summarise_lengths
from dylora_moe.data.templates import end_token_id
from dylora_moe.data.tokenize import Fitted, Overlong, Tokenized, check_lengths, fit_to_length, tokenize_examples
from dylora_moe.errors import DataError

_CHUNK = 256  # examples tokenised together
_MANY = 20_000  # examples that take a while to clean
_SECONDS = 5.0  # between two lines of progress

Tell = Callable[[str], None]


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
    clock, path = _Clock(tell), scratch / EXAMPLES_FILE
    with (result / REMOVED_FILE).open("w", encoding="utf-8", errors="backslashreplace") as file:
        log = _Log(file)
        examples, sources = _read(specs, registry, settings.seed, path, log, clock)
        splits = _split(examples, sources, settings, scratch, tell)
        wheres = open_wheres(path)
        for domain, split in splits.items():
            for left in split.removed:
                other = "" if left.other is None else f" {wheres[left.other]}"
                reason = f"{left.reason}: {left.detail}{other}"
                log.add(domain, wheres[left.place], examples[left.place], reason)
        with Writer(result / ROWS_FILE, ROWS) as rows, Writer(result / EXAMPLES_FILE, EXAMPLES) as held_out:
            tokeniser = _Tokeniser(
                examples=examples,
                wheres=wheres,
                tokenizer=tokenizer,
                settings=settings,
                rows=rows,
                held_out=held_out,
                log=log,
                clock=clock,
            )
            _write_rows(tokeniser, sources, splits, result)


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
    places = {split: array("q") for split in ("train", "validation", "test")}
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
    train, validation, test = (np.array(found, dtype=np.int64) for found in places.values())
    wanted = replace(spec, num_examples=None) if record.is_synthetic else spec  # so many were made
    drawn = train[draw_rows(wanted, len(train), seed=seed)]
    return Source(
        record=record,
        train=drawn,
        validation=validation,
        test=test,
        num_unused=num_unused,
        num_not_drawn=len(train) - len(drawn),
    )


def _split(
    examples: Stored[Example],
    sources: Mapping[str, Sequence[Source]],
    settings: DataSettings,
    scratch: Path,
    tell: Tell,
) -> dict[str, Split]:
    if len(examples) > _MANY:
        tell(f"cleaning {len(examples):,} examples")
    splits = {
        domain: split_domain(domain, examples, parts, settings.validation_split, settings.seed, scratch=scratch)
        for domain, parts in sources.items()
    }
    return {
        domain: take_subsets(examples, split, settings.training_subset, settings.eval_subset, settings.seed)
        for domain, split in without_leaks(examples, splits, scratch=scratch).items()
    }


class _Side:
    """What became of one side of a domain."""

    def __init__(self) -> None:
        self.lengths = array("i")
        self.num_labels = self.num_ends = self.num_dropped = self.num_cut = 0
        self.digest = hashlib.sha256()

    def add(self, example: Example, row: Tokenized, end_token_ids: Sequence[int]) -> None:
        self.lengths.append(len(row))
        self.num_labels += row.num_labels
        self.num_ends += row.labels[-1] in end_token_ids  # it teaches where an answer ends
        self.digest.update(as_json(example.messages).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokeniser:
    """Writes examples as rows, and those held out of training also as they are."""

    examples: Stored[Example]
    wheres: Stored[str]
    tokenizer: PreTrainedTokenizerBase
    settings: DataSettings
    rows: Writer
    held_out: Writer
    log: _Log
    clock: _Clock

    def write(self, domain: str, index: int, places: Places, side_name: str) -> _Side:
        """Write the examples at these places as rows of domain number `index`."""
        side = _Side()
        # What is too long to train on is an error; a row of somebody's test is not.
        overlong = "drop" if (self.settings.overlong, side_name) == ("error", "test") else self.settings.overlong
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK].tolist()
            examples = list(self.examples.take(chunk))
            tokenized = tokenize_examples(examples, self.tokenizer, learn=self.settings.learn)
            fitted = self._fit(tokenized.rows, overlong)
            for number, row in fitted.rows:
                self.rows.add_row(TokenizedRow(input_ids=row.input_ids, labels=row.labels, domain=index))
                side.add(examples[number], row, tokenized.end_token_ids)
                if side_name != "train":
                    self.held_out.add_example(examples[number])
            side.num_dropped += fitted.num_dropped
            side.num_cut += fitted.num_cut
            for number in sorted(set(range(len(chunk))) - {number for number, _ in fitted.rows}):
                reason = f"overlong: {len(tokenized.rows[number])} tokens, max_length is {self.settings.max_length}"
                self.log.add(domain, self.wheres[chunk[number]], examples[number], reason)
            self.clock.tick("tokenising: {} rows", len(self.rows))
        return side

    def _fit(self, rows: Sequence[Tokenized], overlong: Overlong) -> Fitted:
        if overlong == "error":  # once all rows are there, as the error tells what fits them all
            return Fitted(rows=tuple(enumerate(rows)))
        return fit_to_length(rows, max_length=self.settings.max_length, overlong=overlong)


def _write_rows(
    tokeniser: _Tokeniser, sources: Mapping[str, Sequence[Source]], splits: Mapping[str, Split], result: Path
) -> None:
    """Rows of all domains, each domain's training rows first; their columns, and a summary."""
    settings = tokeniser.settings
    summaries: list[DomainSummary] = []
    written: list[tuple[int, int, _Side]] = []  # domain, number of the side, and the rows
    for index, (domain, split) in enumerate(splits.items()):
        sides = zip(SIDES, (split.train, split.validation, split.test), strict=True)
        train, validation, test = (tokeniser.write(domain, index, places, name) for name, places in sides)
        _check_side(domain, "training", train, split.train, split, settings.max_length)
        _check_side(domain, "validation", validation, split.validation, split, settings.max_length)
        summaries.append(_summarise(domain, sources[domain], split, train, validation))
        written += [(index, number, side) for number, side in enumerate((train, validation, test))]
    lengths = np.concatenate([np.array(side.lengths, dtype=np.int32) for _, _, side in written])
    if settings.overlong == "error":
        check_lengths(lengths, settings.max_length)  # of tests only short ones are there
    counts = [len(side.lengths) for _, _, side in written]
    marks = np.repeat(np.array([mark for *mark, _ in written], dtype=np.int32), counts, axis=0)
    for name, column in zip(COLUMNS, (lengths, *marks.T), strict=True):
        np.save(result / f"{name}.npy", column, allow_pickle=False)
    summary = DataSummary(
        domains=tuple(summaries),
        seed=settings.seed,
        max_length=settings.max_length,
        end_token_ids=(end_token_id(tokeniser.tokenizer),),
    )
    (result / SUMMARY_FILE).write_text(json.dumps(asdict(summary)), encoding="utf-8")


def _check_side(domain: str, name: str, side: _Side, places: Places, split: Split, max_length: int) -> None:
    if side.num_ends:
        return
    if side.lengths:
        raise DataError(
            f"Domain {domain!r} must have {name} rows that teach where an answer ends, got none of "
            f"{len(side.lengths)}: all are cut at max_length={max_length} tokens. Raise it, or set overlong: drop."
        )
    if len(places):
        found = f"none of {len(places)} within max_length={max_length}. Raise max_length"
    else:
        reasons = ", ".join(f"{number} {reason}" for reason, number in _count_reasons(split.removed).items())
        found = f"none after cleaning, which left out {reasons or 'no row'}. Mend these rows"
    raise DataError(f"Domain {domain!r} must have at least one {name} row, got {found}, add rows, or leave it out.")


def _summarise(domain: str, sources: Sequence[Source], split: Split, train: _Side, validation: _Side) -> DomainSummary:
    records = [source.record for source in sources]
    return DomainSummary(
        domain=domain,
        sources=tuple(record.where for record in records),
        licences=tuple(dict.fromkeys(record.licence for record in records)),
        num_train=len(train.lengths),
        num_validation=len(validation.lengths),
        num_train_tokens=sum(train.lengths),
        num_train_label_tokens=train.num_labels,
        lengths=summarise_lengths(
            np.concatenate([np.array(side.lengths, dtype=np.int32) for side in (train, validation)])
        ),
        formats=tuple(dict.fromkeys(_describe(found) for record in records for found in record.formats)),
        num_filtered=sum(record.num_filtered for record in records),
        num_test=len(split.test),
        num_unused=sum(source.num_unused for source in sources),
        num_not_drawn=split.num_not_drawn,
        removed=_count_reasons(split.removed),
        num_overlong=train.num_dropped + validation.num_dropped,
        num_cut=train.num_cut + validation.num_cut,
        num_bad_rows=sum(record.num_bad_rows for record in records),
        sha256=hashlib.sha256(train.digest.digest() + validation.digest.digest()).hexdigest(),
    )


def _count_reasons(removed: Sequence[LeftOut]) -> dict[str, int]:
    return {str(reason): number for reason, number in Counter(left.reason for left in removed).items()}


def _describe(found: FoundFormat) -> str:
    return f"{found.format} ({'given' if found.given else 'by columns ' + ', '.join(found.columns)})"
