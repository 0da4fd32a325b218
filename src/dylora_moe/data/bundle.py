"""Prepared data in its folder: what training and its validation read, a row at a time."""

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
# One number a row, int32: its tokens, the index of its domain, and 0 for training or 1 for validation.
COLUMNS = ("lengths", "domains", "sides")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBundle:
    """All that training and its validation read; rows are read from disk when they are asked for.

    Attributes:
        train: Training rows of all domains, domain after domain; the sampler mixes them.
        validation: Validation rows by domain.
        validation_examples: The examples behind `validation`, in the same order.
        removed_file: Rows that were left out, one JSON object a line, with domain, place and reason.
        summary: What went in.
    """

    train: Rows
    validation: dict[str, Rows]
    validation_examples: dict[str, Stored[Example]]
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

    validated = domains[sides == 1]
    indices = {domain.domain: index for index, domain in enumerate(summary.domains)}
    return DataBundle(
        train=choose(sides == 0),
        validation={name: choose((sides == 1) & (domains == index)) for name, index in indices.items()},
        validation_examples={
            name: examples.take(np.flatnonzero(validated == index)) for name, index in indices.items()
        },
        removed_file=folder / REMOVED_FILE,
        summary=summary,
    )
