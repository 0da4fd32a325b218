"""Prepared data in its folder: what training, its validation and a test read, a row at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from dylora_moe.data.example import Example
from dylora_moe.data.stored import Rows, Stored, open_examples, open_rows
from dylora_moe.data.summary import DataSummary

ROWS_FILE, EXAMPLES_FILE = "rows.arrow", "examples.arrow"
SUMMARY_FILE, REMOVED_FILE = "summary.json", "removed.jsonl"
# One number a row, int32: its tokens, the index of its domain, and the index of its side.
COLUMNS = ("lengths", "domains", "sides")
SIDES = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBundle:
    """All that training, its validation and a test read; rows are read from disk when they are asked for.

    Attributes:
        train: Training rows of all domains, domain after domain; the sampler mixes them.
        validation: Validation rows by domain.
        validation_examples: The examples behind `validation`, in the same order.
        test: Rows of official test splits by domain; no row of a domain without one.
        test_examples: The examples behind `test`, in the same order.
        removed_file: Rows that were left out, one JSON object a line, with domain, place and reason.
        summary: What went in.
    """

    train: Rows
    validation: dict[str, Rows]
    validation_examples: dict[str, Stored[Example]]
    test: dict[str, Rows]
    test_examples: dict[str, Stored[Example]]
    removed_file: Path
    summary: DataSummary

    @property
    def domains(self) -> tuple[str, ...]:
        """Their names; a row's `domain` is an index into this."""
        return tuple(domain.domain for domain in self.summary.domains)


def open_bundle(folder: Path) -> DataBundle:
    """Read a folder that `prepare_data` filled."""
    rows, examples = open_rows(folder / ROWS_FILE), open_examples(folder / EXAMPLES_FILE)
    lengths, domains, sides = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in COLUMNS)
    summary = TypeAdapter(DataSummary).validate_json((folder / SUMMARY_FILE).read_bytes())

    def choose(chosen: NDArray[np.bool_]) -> Rows:
        places = np.flatnonzero(chosen)
        return Rows(rows.take(places), lengths[places], domains[places])

    held = sides > 0  # those whose examples are kept
    held_domains, held_sides = domains[held], sides[held]
    indices = {domain.domain: index for index, domain in enumerate(summary.domains)}
    of_side = {
        side: {name: choose((sides == number) & (domains == index)) for name, index in indices.items()}
        for number, side in enumerate(SIDES[1:], start=1)
    }
    examples_of_side = {
        side: {
            name: examples.take(np.flatnonzero((held_sides == number) & (held_domains == index)))
            for name, index in indices.items()
        }
        for number, side in enumerate(SIDES[1:], start=1)
    }
    return DataBundle(
        train=choose(sides == 0),
        validation=of_side["validation"],
        validation_examples=examples_of_side["validation"],
        test=of_side["test"],
        test_examples=examples_of_side["test"],
        removed_file=folder / REMOVED_FILE,
        summary=summary,
    )
