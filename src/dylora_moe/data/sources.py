"""Where examples come from: a registry of data sets, and local files.

A `DatasetSpec` (one entry of a recipe's `datasets`) goes in, a `LoadedSource` of examples comes out.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dylora_moe.config import DATASET_KEYS, DatasetSpec, unknown_dataset_key
from dylora_moe.data.example import Example
from dylora_moe.data.formats import FORMATS, detect_format, nearest, row_to_example
from dylora_moe.data.readers import list_files, read_rows, stem_of
from dylora_moe.data.synthetic import make_examples
from dylora_moe.errors import DataError

# Every common name of a split; rows of any other split (such as MBPP's `prompt`) are not used.
SPLIT_ROLES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_NUM_ERRORS_SHOWN = 5
_NUM_SYNTHETIC = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class IdSplit:
    """An official split given by the range of a row's id, both ends included."""

    split: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """One entry of the registry.

    Attributes:
        name: What a recipe calls it; also the default domain.
        kind: `synthetic` is made by this package, `hub` is downloaded.
        licence: SPDX identifier.
        format: A name in `formats.FORMATS`; None for synthetic data.
        hub_id: `owner/name` on the Hugging Face hub.
        hub_config: The configuration of the hub data set.
        revision: The commit on the hub, so that the same name gives the same rows next year.
        id_column: The column that `id_splits` look at.
        id_splits: The official splits where they are given by ids.
    """

    name: str
    kind: Literal["synthetic", "hub"]
    licence: str
    format: str | None = None
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    id_column: str = "task_id"
    id_splits: tuple[IdSplit, ...] = ()


_SOURCES = (
    DataSource(name="requests", kind="synthetic", licence="CC0-1.0"),
    DataSource(name="stripe", kind="synthetic", licence="CC0-1.0"),
    DataSource(name="flask", kind="synthetic", licence="CC0-1.0"),
    DataSource(
        name="code_alpaca",
        kind="hub",
        hub_id="sahil2801/CodeAlpaca-20k",
        revision="469fd122c8e99d31d9fcd75b2fd01f6bd7eb6846",
        # The hub card says CC-BY-4.0; the authors' repository says NC, the stricter of the two.
        licence="CC-BY-NC-4.0",
        format="alpaca",
    ),
    DataSource(
        name="mbpp",
        kind="hub",
        hub_id="google-research-datasets/mbpp",
        hub_config="full",
        revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        licence="CC-BY-4.0",
        format="mbpp",
        # Source: https://github.com/google-research/google-research/tree/master/mbpp
        id_splits=(
            IdSplit(split="prompt", first=1, last=10),
            IdSplit(split="test", first=11, last=510),
            IdSplit(split="validation", first=511, last=600),
            IdSplit(split="train", first=601, last=974),
        ),
    ),
    DataSource(
        name="gsm8k",
        kind="hub",
        hub_id="openai/gsm8k",
        hub_config="main",
        revision="740312add88f781978c0658806c59bc2815b9866",
        licence="MIT",
        format="gsm8k",
    ),
)
REGISTRY: Mapping[str, DataSource] = {source.name: source for source in _SOURCES}


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
        num_bad_rows: Rows skipped under `on_bad_row: skip`.
        num_unused: Rows of splits that are neither train, validation nor test.
    """

    domain: str
    examples: tuple[Example, ...]
    validation: tuple[Example, ...] | None = None
    test: tuple[Example, ...] | None = None
    licence: str | None = None
    where: str
    num_bad_rows: int = 0
    num_unused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlacedRow:
    split: str
    where: str
    row: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Converted:
    splits: dict[str, list[Example]]
    errors: list[str]


def parse_dataset_spec(value: object) -> DatasetSpec:
    """A registry name, a path, or a mapping with the fields of `DatasetSpec` -> the record.

    A text that is a name in the registry is never taken for a path; write `./mbpp` for a file of that name.

    Raises:
        DataError: The value has another type, an unknown key, or a field that cannot work.
    """
    if isinstance(value, DatasetSpec):
        _check_fields(value)
        return value
    if isinstance(value, str | Path) and str(value).strip():
        text = str(value).strip()
        return DatasetSpec(name=text) if text in REGISTRY else DatasetSpec(path=text)
    if not isinstance(value, Mapping):
        raise DataError(
            "An entry of datasets must be a name, a path or a mapping such as "
            f"{{path: rows.jsonl, domain: sql}}, got {type(value).__name__} {value!r}."
        )
    for key in value:
        if key not in DATASET_KEYS:
            raise DataError(unknown_dataset_key(str(key)))
    spec = DatasetSpec(**value)
    _check_fields(spec)
    return spec


def _check_fields(spec: DatasetSpec) -> None:
    for field in ("name", "path", "domain", "format", "licence"):
        text = getattr(spec, field)
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise DataError(f"{field} of a datasets entry must be text, got {text!r}.")
    if spec.name is None and spec.path is None:
        raise DataError(f"A datasets entry must have a name or a path, got {spec}. Names: {_known_names()}.")
    if spec.name is not None and spec.name not in REGISTRY:
        raise DataError(
            f"name must be one of {_known_names()}, got {spec.name!r}.{nearest(spec.name, REGISTRY)} "
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


def _known_names() -> str:
    return ", ".join(REGISTRY)


def check_path(spec: DatasetSpec) -> None:
    """Stop before any work where the path of a spec does not exist.

    Raises:
        DataError: With the nearest name of the registry, as a path may be a name with a typo.
    """
    if spec.path is not None and not Path(spec.path).expanduser().exists():
        raise DataError(
            f"A data set must be a known name ({_known_names()}) or an existing file or folder, "
            f"got {spec.path!r}.{nearest(spec.path, REGISTRY)}"
        )


def load_examples(spec: DatasetSpec, *, seed: int) -> LoadedSource:
    """Make, read or download the examples of one data set.

    Args:
        spec: What to load.
        seed: Decides synthetic examples, and which rows `num_examples` draws from a larger set.

    Raises:
        DataError: The data cannot be reached or read, a row is bad, or no training row is left.
    """
    entry = REGISTRY[spec.name] if spec.name is not None else None
    if spec.path is None and entry is not None and entry.kind == "synthetic":
        return _make(spec, entry, seed=seed)
    if spec.path is None:
        if entry is None:
            raise DataError(f"A datasets entry must have a name or a path, got {spec}.")
        where, stem, rows = f"hub:{entry.hub_id}@{entry.revision}", entry.name, _hub_rows(entry)
    else:
        check_path(spec)
        path = Path(spec.path).expanduser()
        where, stem, rows = str(path), entry.name if entry else stem_of(path), _local_rows(path)
    licence = spec.licence or (entry.licence if entry else None)
    domain = spec.domain or stem
    source = entry.name if entry else where
    row_format = spec.format or (entry.format if entry else None)
    read = _convert(rows, format=row_format, domain=domain, source=source, licence=licence)
    if read.errors and (spec.on_bad_row == "stop" or not read.splits["train"]):
        raise DataError(_bad_rows_text(read, where))
    return LoadedSource(
        domain=domain,
        examples=_draw(read.splits["train"], spec.num_examples, where=where, seed=seed),
        validation=tuple(read.splits["validation"]) or None,
        test=tuple(read.splits["test"]) or None,
        licence=licence,
        where=where,
        num_bad_rows=len(read.errors),
        num_unused=len(read.splits["unused"]),
    )


def _make(spec: DatasetSpec, entry: DataSource, *, seed: int) -> LoadedSource:
    domain, licence = spec.domain or entry.name, spec.licence or entry.licence
    examples = make_examples(entry.name, num_examples=spec.num_examples or _NUM_SYNTHETIC, seed=seed)
    return LoadedSource(
        domain=domain,
        examples=tuple(replace(example, domain=domain, licence=licence) for example in examples),
        licence=licence,
        where=f"synthetic:{entry.name}",
    )


def _local_rows(path: Path) -> Iterator[_PlacedRow]:
    for file in list_files(path):
        # In a folder `test.jsonl` and `test-00000-of-00001.parquet` are not for training.
        split = re.sub(r"-\d+-of-\d+$", "", stem_of(file)).lower() if path.is_dir() else "train"
        for where, row in read_rows(file):
            yield _PlacedRow(split=split if split in SPLIT_ROLES else "train", where=where, row=row)


def _hub_rows(entry: DataSource) -> Iterator[_PlacedRow]:
    # Seconds to import, and needed for this kind of source only.
    import datasets

    try:
        loaded = datasets.load_dataset(str(entry.hub_id), entry.hub_config, revision=entry.revision)
    except Exception as error:
        # The hub client raises its own, httpx's and pyarrow's errors; all mean that the rows are not here.
        raise DataError(
            f"The data set {entry.name!r} must be reachable on the hub as {entry.hub_id}, got "
            f"{type(error).__name__}: {error}. Check the network, or give a local copy: "
            f"{{name: {entry.name}, path: {entry.name}.jsonl}}"
        ) from error
    for split, rows in loaded.items():
        for index, row in enumerate(rows, start=1):
            where = f"{entry.hub_id}, {split} row {index}"
            yield _PlacedRow(split=str(split), where=where, row=dict(row))


def _convert(
    rows: Iterable[_PlacedRow], *, format: str | None, domain: str, source: str, licence: str | None
) -> _Converted:
    """Sort the rows into splits; without a format every row's columns decide."""
    result = _Converted(splits={split: [] for split in ("train", "validation", "test", "unused")}, errors=[])
    last = None
    for placed in rows:
        found = format or _detect(placed, last)
        try:
            example = row_to_example(
                placed.row, format=found, domain=domain, source=source, licence=licence, where=placed.where
            )
        except DataError as error:
            result.errors.append(str(error))
        else:
            split = _official_split(placed.row, found) or placed.split
            result.splits[SPLIT_ROLES.get(split, "unused")].append(example)
        last = found
    return result


def _detect(placed: _PlacedRow, last: str | None) -> str:
    try:
        return detect_format(placed.row)
    except DataError as error:
        if last is None:
            raise DataError(f"{placed.where}: {error}") from error
        # Rows before it were readable: read as one of them, it gives an error that names the missing field.
        return last


def _official_split(row: Mapping[str, object], format: str) -> str | None:
    """By the id of a row that is MBPP's own beyond doubt: rows of a user have a task_id too, but no list of tests."""
    if "test_list" not in row:
        return None
    for entry in REGISTRY.values():
        number = row.get(entry.id_column)
        if entry.format == format and isinstance(number, int):
            for part in entry.id_splits:
                if part.first <= number <= part.last:
                    return part.split
    return None


def _bad_rows_text(read: _Converted, where: str) -> str:
    num_bad = len(read.errors)
    num_rows = num_bad + sum(map(len, read.splits.values()))
    shown = "".join(f"\n  - {text}" for text in read.errors[:_NUM_ERRORS_SHOWN])
    more = f"\n  - and {num_bad - _NUM_ERRORS_SHOWN} more" if num_bad > _NUM_ERRORS_SHOWN else ""
    return (
        f"{where}: every row must hold a prompt and an answer, but {num_bad} of {num_rows} do not:"
        f"{shown}{more}\n"
        "Mend these rows, or set on_bad_row: skip, which leaves them out, counts them and needs one good row."
    )


def _draw(examples: Sequence[Example], num_examples: int | None, *, where: str, seed: int) -> tuple[Example, ...]:
    if not examples:
        raise DataError(
            f"{where}: a data set must hold at least one training row, got none. Rows in files named test or "
            "validation, or with a task_id of MBPP's official test or validation split, are not trained on."
        )
    if num_examples is None:
        return tuple(examples)
    if num_examples > len(examples):
        raise DataError(
            f"{where}: num_examples must be at most the {len(examples)} training rows there are, "
            f"got {num_examples}. Lower it or leave it out."
        )
    chosen = random.Random(seed).sample(range(len(examples)), num_examples)
    return tuple(examples[index] for index in sorted(chosen))
