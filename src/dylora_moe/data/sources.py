"""Where examples come from: data sets of the registry, and local files.

A `DatasetSpec` (one entry of a recipe's `datasets`) goes in; a `LoadedSource` of examples comes out, or, one example at
a time, a `SourceReader`.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dylora_moe.config import DATASET_KEYS, DatasetSpec, unknown_dataset_key
from dylora_moe.data.example import Example
from dylora_moe.data.formats import FORMATS, nearest
from dylora_moe.data.readers import BadRow
from dylora_moe.data.registry import (
    REGISTRY,
    DataSource,
    IdSplit,
    check_map,
    extend_registry,
    load_registry,
)
from dylora_moe.data.source_reader import SPLIT_ROLES, FoundFormat, SourceReader, SplitExample
from dylora_moe.errors import DataError

__all__ = [
    "REGISTRY",
    "SPLIT_ROLES",
    "BadRow",
    "DataSource",
    "DatasetSpec",
    "FoundFormat",
    "IdSplit",
    "LoadedSource",
    "SourceReader",
    "SplitExample",
    "check_path",
    "extend_registry",
    "load_examples",
    "load_registry",
    "parse_dataset_spec",
]
_NUM_ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSource:
    """The examples of one data set.

    Attributes:
        domain: The skill they belong to.
        examples: What may be trained on.
        validation: The official validation split, or None where there is none.
        test: The official test split, or None; never trained on.
        licence: SPDX identifier, or None where unknown.
        where: The file, hub address or generator that they came from.
        formats: Which formats the rows had; empty for synthetic examples.
        bad_rows: Rows skipped under `on_bad_row: skip`.
        num_filtered: Rows that the entry's filter leaves out.
        num_unused: Examples of splits that are neither train, validation nor test.
    """

    domain: str
    examples: tuple[Example, ...]
    validation: tuple[Example, ...] | None = None
    test: tuple[Example, ...] | None = None
    licence: str | None = None
    where: str
    formats: tuple[FoundFormat, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()
    num_filtered: int = 0
    num_unused: int = 0

    @property
    def num_bad_rows(self) -> int:
        """How many rows were skipped."""
        return len(self.bad_rows)


def parse_dataset_spec(value: object, registry: Mapping[str, DataSource] = REGISTRY) -> DatasetSpec:
    """A registry name, a path, or a mapping with the fields of `DatasetSpec` -> the record.

    A text that is a name in the registry is never taken for a path; write `./mbpp` for a file of that name.

    Raises:
        DataError: The value has another type, an unknown key, or a field that cannot work.
    """
    if isinstance(value, DatasetSpec):
        _check_fields(value, registry)
        return value
    if isinstance(value, str | Path) and str(value).strip():
        text = str(value).strip()
        return DatasetSpec(name=text) if text in registry else DatasetSpec(path=text)
    if not isinstance(value, Mapping):
        raise DataError(
            "An entry of datasets must be a name, a path or a mapping such as "
            f"{{path: rows.jsonl, domain: sql}}, got {type(value).__name__} {value!r}."
        )
    for key in value:
        if key not in DATASET_KEYS:
            raise DataError(unknown_dataset_key(str(key)))
    spec = DatasetSpec(**value)
    _check_fields(spec, registry)
    return spec


def _check_fields(spec: DatasetSpec, registry: Mapping[str, DataSource]) -> None:
    for field in ("name", "path", "domain", "format", "licence"):
        text = getattr(spec, field)
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise DataError(f"{field} of a datasets entry must be text, got {text!r}.")
    if spec.name is None and spec.path is None:
        raise DataError(f"A datasets entry must have a name or a path, got {spec}. Names: {', '.join(registry)}.")
    if spec.name is not None and spec.name not in registry:
        raise DataError(
            f"name must be one of {', '.join(registry)}, got {spec.name!r}.{nearest(spec.name, registry)} "
            "Give own data by path, and its label as domain."
        )
    if spec.format is not None and spec.format not in FORMATS:
        raise DataError(
            f"format must be one of {', '.join(FORMATS)}, got {spec.format!r}.{nearest(spec.format, FORMATS)}"
        )
    number = spec.num_examples
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise DataError(f"num_examples must be a whole number of at least 1, got {number!r}.")
    if spec.on_bad_row not in ("stop", "skip"):
        raise DataError(f"on_bad_row must be stop or skip, got {spec.on_bad_row!r}.")
    if not isinstance(spec.keep_all, bool):
        raise DataError(f"keep_all must be true or false, got {spec.keep_all!r}.")
    if spec.columns is not None:
        check_map(spec.columns, where="columns of a datasets entry")


def check_path(spec: DatasetSpec, registry: Mapping[str, DataSource] = REGISTRY) -> None:
    """Stop before any work where the path of a spec, or of its entry, does not exist, or a file has to be given.

    Raises:
        DataError: With the nearest name of the registry, as a path may be a name with a typo.
    """
    entry = registry[spec.name] if spec.name is not None else None
    path = spec.path if spec.path is not None else entry and entry.path
    if path is not None and not Path(path).expanduser().exists():
        raise DataError(
            f"A data set must be a known name ({', '.join(registry)}) or an existing file or folder, "
            f"got {path!r}.{nearest(path, registry)}"
        )
    if path is None and entry is not None and entry.kind == "file":
        raise DataError(
            f"The data set {entry.name!r} must be given as a file, since no hub has it. Fetch {entry.homepage}, and "
            f"write {{name: {entry.name}, path: the file}}."
        )


def load_examples(spec: DatasetSpec, *, seed: int, registry: Mapping[str, DataSource] = REGISTRY) -> LoadedSource:
    """Make, read or download the examples of one data set.

    Args:
        spec: What to load.
        seed: Decides synthetic examples, and which rows `num_examples` draws from a larger set.
        registry: What names mean.

    Raises:
        DataError: The data cannot be reached or read, a row is bad, or no training row is left.
    """
    check_path(spec, registry)
    bad_rows: list[BadRow] = []
    num_bad = 0

    def note(bad: BadRow) -> None:
        nonlocal num_bad
        num_bad += 1
        # Where the run stops on them, the few that are shown are enough.
        if spec.on_bad_row == "skip" or num_bad <= _NUM_ERRORS_SHOWN:
            bad_rows.append(bad)

    reader = SourceReader(spec, seed=seed, registry=registry, on_bad=note)
    splits: dict[str, list[Example]] = {split: [] for split in ("train", "validation", "test", "unused")}
    for item in reader:
        splits[item.split].append(item.example)
    if num_bad and (spec.on_bad_row == "stop" or not splits["train"]):
        raise DataError(_bad_rows_text(bad_rows, num_bad, reader))
    return LoadedSource(
        domain=reader.domain,
        examples=_draw(splits["train"], None if reader.is_synthetic else spec.num_examples, reader, seed=seed),
        validation=tuple(splits["validation"]) or None,
        test=tuple(splits["test"]) or None,
        licence=reader.licence,
        where=reader.where,
        formats=reader.formats,
        bad_rows=tuple(bad_rows),
        num_filtered=reader.num_filtered,
        num_unused=len(splits["unused"]),
    )


def _bad_rows_text(bad_rows: Sequence[BadRow], num_bad: int, reader: SourceReader) -> str:
    num_rows = num_bad + sum(found.num_rows for found in reader.formats)
    shown = "".join(f"\n  - {bad.where}: {bad.reason}" for bad in bad_rows[:_NUM_ERRORS_SHOWN])
    more = f"\n  - and {num_bad - _NUM_ERRORS_SHOWN} more" if num_bad > _NUM_ERRORS_SHOWN else ""
    return (
        f"{reader.where}: every row must hold a prompt and an answer, but {num_bad} of {num_rows} do not:"
        f"{shown}{more}\n"
        "Mend these rows, or set on_bad_row: skip, which leaves them out, counts them and needs one good row."
    )


def _draw(
    examples: Sequence[Example], num_examples: int | None, reader: SourceReader, *, seed: int
) -> tuple[Example, ...]:
    if not examples:
        filtered = (
            f" The filter of the entry left out {reader.num_filtered} rows; keep_all: true uses them."
            if reader.num_filtered
            else ""
        )
        raise DataError(
            f"{reader.where}: a data set must hold at least one training row, got none. Rows in files named test or "
            "validation, or with a task_id of MBPP's official test or validation split, are not trained on."
            f"{filtered}"
        )
    if num_examples is None:
        return tuple(examples)
    if num_examples > len(examples):
        raise DataError(
            f"{reader.where}: num_examples must be at most the {len(examples)} training rows there are, "
            f"got {num_examples}. Lower it or leave it out."
        )
    chosen = random.Random(seed).sample(range(len(examples)), num_examples)
    return tuple(examples[index] for index in sorted(chosen))
