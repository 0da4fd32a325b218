"""The examples of one data set, one at a time: rows of a file or the hub, columns mapped, format and split found."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, final

from dylora_moe.config import DatasetSpec
from dylora_moe.data.example import Example
from dylora_moe.data.formats import detect_format, row_to_examples, translation_of
from dylora_moe.data.languages import NUM_ROWS_CHECKED, check_language_columns, language_columns
from dylora_moe.data.readers import BadRow, OnBad, list_files, read_labels, read_rows, stem_of, stop_at
from dylora_moe.data.registry import REGISTRY, DataSource
from dylora_moe.data.synthetic import make_examples
from dylora_moe.errors import DataError

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "validation", "test", "unused"]
# Every common name of a split; rows of any other split (such as MBPP's `prompt`) are not used.
SPLIT_ROLES: Mapping[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
}
_NUM_SYNTHETIC = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitExample:
    """An example, where its row stands, and the part of the data set that the row belongs to."""

    split: Split
    where: str
    example: Example


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFormat:
    """A format that rows of a data set had.

    Attributes:
        format: Its name in `FORMATS`.
        given: Whether the recipe or the registry said so; otherwise the columns did.
        columns: Those of the first such row, after mapping.
        num_rows: Good rows of this format.
    """

    format: str
    given: bool
    columns: tuple[str, ...]
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlacedRow:
    """A row; `row` has its columns mapped, `raw` is as read, `labels` is the label list of its file."""

    split: str
    where: str
    raw: Mapping[str, object]
    row: Mapping[str, object]
    labels: tuple[str, ...] | None = None


@final
class SourceReader:
    """Reads one data set; iterate over it for its examples. Only one row at a time is in memory, but for .json files.

    Attributes:
        domain: The skill that the examples belong to.
        licence: SPDX identifier, or None where unknown.
        where: The file, hub address or generator that they come from.
        is_synthetic: Whether they are made here; `num_examples` is then how many.
        num_filtered: Rows that the entry's filter left out so far.

    Args:
        spec: A checked entry of `datasets`; its `num_examples` and `on_bad_row` are the caller's business.
        seed: Decides synthetic examples.
        registry: What names mean.
        on_bad: What to do about a bad row; the default stops.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        *,
        seed: int,
        registry: Mapping[str, DataSource] = REGISTRY,
        on_bad: OnBad = stop_at,
    ) -> None:
        self._spec, self._seed, self._registry, self._on_bad = spec, seed, registry, on_bad
        entry = self._entry = registry[spec.name] if spec.name is not None else None
        path = spec.path if spec.path is not None else entry.path if entry else None
        self._path = Path(path).expanduser() if path is not None else None
        self.is_synthetic = self._path is None and entry is not None and entry.kind == "synthetic"
        if self._path is not None:
            self.where = str(self._path)
        elif entry is not None:
            hub = f"hub:{entry.hub_id}@{entry.revision or 'newest'}"
            self.where = f"synthetic:{entry.name}" if self.is_synthetic else hub
        else:
            raise DataError(f"A datasets entry must have a name or a path, got {spec}.")
        self.licence = spec.licence or (entry.licence if entry else None)
        self.domain = spec.domain or (entry.domain or entry.name if entry else stem_of(Path(self.where)))
        self._format = spec.format or (entry.format if entry else None)
        self._keep = {} if entry is None or spec.keep_all else entry.keep
        self._restart()

    def _restart(self) -> None:
        self.num_filtered = 0
        self._columns: dict[str, tuple[str, ...]] = {}
        self._num_rows: Counter[str] = Counter()

    @property
    def formats(self) -> tuple[FoundFormat, ...]:
        """The formats of the rows read so far, in the order of their first rows."""
        given = self._format is not None
        return tuple(
            FoundFormat(format=name, given=given, columns=tuple(map(_writable, columns)), num_rows=self._num_rows[name])
            for name, columns in self._columns.items()
        )

    def __iter__(self) -> Iterator[SplitExample]:
        self._restart()
        return self._made() if self.is_synthetic else self._read()

    def _made(self) -> Iterator[SplitExample]:
        name = cast(DataSource, self._entry).name
        number = self._spec.num_examples or _NUM_SYNTHETIC
        for example in make_examples(name, num_examples=number, seed=self._seed):
            example = replace(example, domain=self.domain, licence=self.licence)
            yield SplitExample(split="train", where=self.where, example=example)

    def _read(self) -> Iterator[SplitExample]:
        last: str | None = None
        last_columns: tuple[str, ...] = ()
        source = self._entry.name if self._entry else self.where
        for placed in self._placed_rows():
            if self._keep and not _is_kept(placed.raw, self._keep):
                self.num_filtered += 1
                continue
            # Rows with the same columns have the same format, and looking is a fifth of the time.
            if (columns := tuple(placed.row)) != last_columns or last is None:
                last, last_columns = self._format or _detect(placed, last), columns
            found = last
            row = placed.row if placed.labels is None else {"labels": placed.labels, **placed.row}
            try:
                examples = row_to_examples(
                    row, format=found, domain=self.domain, source=source, licence=self.licence, where=placed.where
                )
            except DataError as error:
                self._on_bad(_bad_row(placed.where, error, placed.raw))
                continue
            self._columns.setdefault(found, columns)
            self._num_rows[found] += 1
            split = self._official_split(placed.row, found) or placed.split
            for example in examples:
                yield SplitExample(split=SPLIT_ROLES.get(split, "unused"), where=placed.where, example=example)

    def _official_split(self, row: Mapping[str, object], format: str) -> str | None:
        """By the id of a row that is MBPP's own beyond doubt: rows of a user may have an id, but no list of tests."""
        if "test_list" not in row:
            return None
        for entry in self._registry.values():
            number = row.get(entry.id_column)
            if entry.format == format and isinstance(number, int):
                for part in entry.id_splits:
                    if part.first <= number <= part.last:
                        return part.split
        return None

    def _placed_rows(self) -> Iterator[_PlacedRow]:
        """The rows of all files or splits; the columns of each are checked before its first row."""
        for where, rows in self._parts():
            mapped = self._mapped(rows)
            head = list(islice(mapped, 1))
            # Rows are read ahead only where there is something to check.
            if head and len(language_columns(translation_of(head[0].row))) == 2:
                head += islice(mapped, NUM_ROWS_CHECKED - 1)
                check_language_columns((translation_of(placed.row) for placed in head), where=where)
            yield from chain(head, mapped)

    def _mapped(self, rows: Iterator[_PlacedRow]) -> Iterator[_PlacedRow]:
        given = self._spec.columns is not None
        columns = (self._spec.columns if given else self._entry.columns if self._entry else None) or {}
        is_first = True
        for placed in rows:
            # A local copy of a registered data set may have the names of the format already.
            present = columns if given else {name: column for name, column in columns.items() if column in placed.raw}
            missing = [column for column in present.values() if column not in placed.raw]
            if missing:
                reason = (
                    f"columns must name columns of the file, got {missing[0]!r}; the row has "
                    f"{', '.join(map(str, placed.raw))}. Write columns: {{field of the format: column of the file}}."
                )
                # Where the first row lacks it the map is wrong, and not the row.
                on_bad = stop_at if is_first else self._on_bad
                on_bad(BadRow(where=placed.where, reason=reason, row=placed.raw))
            elif present:
                used = set(present.values())
                row = {name: value for name, value in placed.raw.items() if name not in used}
                yield replace(placed, row=row | {name: placed.raw[column] for name, column in present.items()})
            else:
                yield placed
            is_first = False

    def _parts(self) -> Iterator[tuple[str, Iterator[_PlacedRow]]]:
        if self._path is None:
            yield from _hub_parts(cast(DataSource, self._entry))
            return
        for file in list_files(self._path):
            # In a folder `test.jsonl` and `test-00000-of-00001.parquet` are not for training.
            split = re.sub(r"-\d+-of-\d+$", "", stem_of(file)).lower() if self._path.is_dir() else "train"
            yield str(file), self._file_rows(file, split if split in SPLIT_ROLES else "train")

    def _file_rows(self, file: Path, split: str) -> Iterator[_PlacedRow]:
        labels = read_labels(file)
        for where, row in read_rows(file, self._on_bad):
            yield _PlacedRow(split=split, where=where, raw=row, row=row, labels=labels)


def hub_fingerprint(entry: DataSource) -> list[str]:
    """What tells the content of a hub data set apart, by the library that caches it.

    Raises:
        DataError: It cannot be reached.
    """
    return [rows._fingerprint for _, rows in sorted(_load_from_hub(entry).items())]


def _load_from_hub(entry: DataSource) -> "datasets.DatasetDict":
    # Seconds to import, and needed for this kind of source only.
    import datasets

    try:
        return datasets.load_dataset(
            str(entry.hub_id), entry.hub_config, revision=entry.revision, data_files=entry.data_files
        )
    except Exception as error:
        # The hub client raises its own, httpx's and pyarrow's errors; all mean that the rows are not here.
        raise DataError(
            f"The data set {entry.name!r} must be reachable on the hub as {entry.hub_id}, got "
            f"{type(error).__name__}: {error}. Check the network, or give a local copy: "
            f"{{name: {entry.name}, path: {entry.name}.jsonl}}"
        ) from error


def _hub_parts(entry: DataSource) -> Iterator[tuple[str, Iterator[_PlacedRow]]]:
    for split, rows in _load_from_hub(entry).items():
        labels = getattr((rows.features or {}).get("label"), "names", None)
        yield f"{entry.hub_id}, {split}", _hub_rows(entry, str(split), rows, tuple(labels) if labels else None)


def _hub_rows(entry: DataSource, split: str, rows: object, labels: tuple[str, ...] | None) -> Iterator[_PlacedRow]:
    for index, found in enumerate(cast("Iterator[Mapping[str, object]]", rows), start=1):
        row = dict(found)
        yield _PlacedRow(split=split, where=f"{entry.hub_id}, {split} row {index}", raw=row, row=row, labels=labels)


def _is_kept(row: Mapping[str, object], keep: Mapping[str, str]) -> bool:
    # re keeps the compiled patterns.
    return any(
        re.search(pattern, value) for column, pattern in keep.items() if isinstance(value := row.get(column), str)
    )


def _detect(placed: _PlacedRow, last: str | None) -> str:
    try:
        return detect_format(placed.row)
    except DataError as error:
        if last is None:
            raise DataError(f"{placed.where}: {error}") from error
        # Rows before it were readable: read as one of them, it gives an error that names the missing field.
        return last


def _bad_row(where: str, error: DataError, row: object) -> BadRow:
    reason = str(error).removeprefix(where).lstrip(":, ")
    return BadRow(where=where, reason=reason, row=row)


def _writable(name: str) -> str:
    """The name of a column without halves of surrogate pairs, which JSON can spell and no file of text takes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
