"""What went into a run, as a record: rows, tokens, lengths and what was left out, by domain."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dylora_moe.data.tokenize import quantile

HISTOGRAM_STEPS = 16


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
        num_test: Rows of an official test split; their prompts are not trained on.
        num_unused: Rows of official splits that are for neither training, validation nor test.
        num_not_drawn: Rows that `num_examples` or a subset leaves out.
        removed: Rows left out by each rule of `data.cleaning`.
        num_overlong: Rows left out for their length.
        num_cut: Longer rows of which the beginning was kept, or that became several.
        num_bad_rows: Rows left out under `on_bad_row: skip`.
        sha256: Over the two SHA-256 digests (32 bytes each) of the training and of the validation conversations used,
            each the digest of their `splits.as_json` texts one after the other.
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
    num_not_drawn: int
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


def summarise_lengths(lengths: NDArray[np.int32]) -> LengthQuantiles:
    """Of at least one row."""
    ordered = np.sort(lengths)
    # Steps end at whole parts of the maximum, each belonging to the step before it.
    steps = -(-ordered.astype(np.int64) * HISTOGRAM_STEPS // int(ordered[-1])) - 1
    return LengthQuantiles(
        minimum=int(ordered[0]),
        median=quantile(ordered, 0.5),
        p90=quantile(ordered, 0.9),
        p99=quantile(ordered, 0.99),
        maximum=int(ordered[-1]),
        histogram=tuple(np.bincount(steps, minlength=HISTOGRAM_STEPS).tolist()),
    )
