"""Where examples come from: data sets of the registry, and local files.

A `DatasetSpec` (one entry of a recipe's `datasets`) goes in; examples come out one at a time, and a `SourceRecord`.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dylora_moe.config import DATASET_KEYS, DatasetSpec, unknown_dataset_key
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
    "SourceReader",
    "SourceRecord",
    "SplitExample",
    "check_path",
    "draw_rows",
    "extend_registry",
    "load_registry",
    "parse_dataset_spec",
    "read_source",
]
_NUM_ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """What is known of a data set once it was read.

    Attributes:
        domain: The skill that its examples belong to.
        licence: SPDX identifier, or None where unknown.
        where: The file, hub address or generator that they came from.
        is_synthetic: Whether they were made here.
        formats: Which formats the rows had; empty for synthetic examples.
        num_bad_rows: Rows skipped under `on_bad_row: skip`.
        num_filtered: Rows that the entry's filter leaves out.
    """

    domain: str
    licence: str | None = None
    where: str
    is_synthetic: bool = False
    formats: tuple[FoundFormat, ...] = ()
    num_bad_rows: int = 0
    num_filtered: int = 0


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
    if spec.part is not None:
        parse_part(spec.part)
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


def read_source(
    spec: DatasetSpec,
    *,
    seed: int,
    add: Callable[[SplitExample], None],
    on_bad: Callable[[str, BadRow], None] = lambda domain, bad: None,
    registry: Mapping[str, DataSource] = REGISTRY,
) -> SourceRecord:
    """Make, read or download the examples of one data set, one at a time.

    Args:
        spec: What to load.
        seed: Decides synthetic examples.
        add: Takes each example.
        on_bad: Takes the domain and each row that is skipped under `on_bad_row: skip`.
        registry: What names mean.

    Raises:
        DataError: The data cannot be reached or read, a row is bad, or no training row is left.
    """
    check_path(spec, registry)
    shown: list[BadRow] = []
    num_bad = num_train = 0

    def note(bad: BadRow) -> None:
        nonlocal num_bad
        num_bad += 1
        if num_bad <= _NUM_ERRORS_SHOWN:
            shown.append(bad)
        if spec.on_bad_row == "skip":
            on_bad(reader.domain, bad)

    reader = SourceReader(spec, seed=seed, registry=registry, on_bad=note)
    for item in reader:
        num_train += item.split == "train"
        add(item)
    if num_bad and (spec.on_bad_row == "stop" or not num_train):
        raise DataError(_bad_rows_text(shown, num_bad, reader))
    _check_number(num_train, None if reader.is_synthetic else spec.num_examples, reader)
    return SourceRecord(
        domain=reader.domain,
        licence=reader.licence,
        where=reader.where,
        is_synthetic=reader.is_synthetic,
        formats=reader.formats,
        num_bad_rows=num_bad,
        num_filtered=reader.num_filtered,
    )


def draw_rows(spec: DatasetSpec, number: int, *, seed: int) -> Sequence[int]:
    """Places of the training rows to use, of so many that were read: all, or the `part` and `num_examples` of them.

    Raises:
        DataError: The part has no row, or fewer than `num_examples`.
    """
    chosen: Sequence[int] = range(number)
    if spec.part is not None:
        index, count = parse_part(spec.part)
        chosen = random.Random(f"{seed}/part").sample(chosen, number)[index - 1 :: count]
        if not chosen:
            raise DataError(
                f"part of a datasets entry must leave each part a training row, got {spec.part} of {number} rows. "
                "Take fewer parts."
            )
        if spec.num_examples is not None and spec.num_examples > len(chosen):
            raise DataError(
                f"num_examples must be at most the {len(chosen)} training rows of part {spec.part}, got "
                f"{spec.num_examples}. Lower it, or take larger parts."
            )
    if spec.num_examples is not None and spec.num_examples < len(chosen):
        chosen = random.Random(seed).sample(chosen, spec.num_examples)
    return sorted(chosen)


def parse_part(text: object) -> tuple[int, int]:
    """`2/3` -> (2, 3).

    Raises:
        DataError: It is no such text.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise DataError(f"part of a datasets entry must be one of so many, such as 1/2 or 2/2, got {text!r}.")
    return int(found[1]), int(found[2])


def _bad_rows_text(bad_rows: Sequence[BadRow], num_bad: int, reader: SourceReader) -> str:
    num_rows = num_bad + sum(found.num_rows for found in reader.formats)
    shown = "".join(f"\n  - {bad.where}: {bad.reason}" for bad in bad_rows[:_NUM_ERRORS_SHOWN])
    more = f"\n  - and {num_bad - _NUM_ERRORS_SHOWN} more" if num_bad > _NUM_ERRORS_SHOWN else ""
    return (
        f"{reader.where}: every row must hold a prompt and an answer, but {num_bad} of {num_rows} do not:"
        f"{shown}{more}\n"
        "Mend these rows, or set on_bad_row: skip, which leaves them out, counts them and needs one good row."
    )


def _check_number(num_train: int, num_examples: int | None, reader: SourceReader) -> None:
    if not num_train:
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
    if num_examples is not None and num_examples > num_train:
        raise DataError(
            f"{reader.where}: num_examples must be at most the {num_train} training rows there are, "
            f"got {num_examples}. Lower it or leave it out."
        )
