"""Examples and rows in Arrow files: written once from front to back, read a few at a time in bounded memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.example import Example, Message

# Records read together: few, so that reading one at random is cheap. Batches read last are kept.
_BATCH, _BATCHES_KEPT = 64, 16

EXAMPLES = pa.schema([("example", pa.string()), ("where", pa.string())])
ROWS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("domain", pa.int32())])

T = TypeVar("T")


class Writer:
    """Adds records to an Arrow file, a batch at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._waiting: dict[str, list[Any]] = {name: [] for name in schema.names}
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, schema)
        self._count = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
            self._writer.close()
        self._file.close()

    def __len__(self) -> int:
        """Records added."""
        return self._count

    def add_example(self, example: Example, where: str = "") -> None:
        """Add a record of `EXAMPLES`; `where` is the place of its row."""
        messages = [(message.role, message.content) for message in example.messages]
        values = (messages, example.domain, example.source, example.licence)
        self._add(example=json.dumps(values, ensure_ascii=False), where=where)

    def add_row(self, row: TokenizedRow) -> None:
        """Add a record of `ROWS`."""
        self._add(input_ids=row.input_ids, labels=row.labels, domain=row.domain)

    def _add(self, **values: Any) -> None:
        for name, column in self._waiting.items():
            column.append(values[name])
        self._count += 1
        if self._count % _BATCH == 0:
            self._flush()

    def _flush(self) -> None:
        columns = [pa.array(self._waiting[name], type=self._schema.field(name).type) for name in self._schema.names]
        if len(columns[0]):
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        for column in self._waiting.values():
            column.clear()


class Stored(Sequence[T], Generic[T]):
    """Records of a file, or some of them in another order; each is read when it is asked for.

    Args:
        batch: Number -> that batch of the file.
        read: A batch and a place in it -> the record.
        places: Of the records to have, in the file.
    """

    def __init__(
        self,
        batch: Callable[[int], pa.RecordBatch],
        read: Callable[[pa.RecordBatch, int], T],
        places: NDArray[np.int64],
    ) -> None:
        self._batch, self._read, self.places = batch, read, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> "Stored[T]": ...

    def __getitem__(self, index: int | slice) -> "T | Stored[T]":
        if isinstance(index, slice):
            return Stored(self._batch, self._read, self.places[index])
        place = int(self.places[index])
        return self._read(self._batch(place // _BATCH), place % _BATCH)

    def __iter__(self) -> Iterator[T]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Stored[T]":
        """These records alone, in this order."""
        return Stored(self._batch, self._read, self.places[np.asarray(indices, dtype=np.int64)])


def open_examples(path: Path) -> Stored[Example]:
    """The examples of a file that a `Writer` wrote."""
    return _open(path, _read_example)


def open_wheres(path: Path) -> Stored[str]:
    """Where the rows of the examples of a file stand."""
    return _open(path, lambda batch, index: batch.column("where")[index].as_py())


def open_rows(path: Path) -> Stored[TokenizedRow]:
    """The rows of a file that a `Writer` wrote."""
    return _open(path, _read_row)


def _open(path: Path, read: Callable[[pa.RecordBatch, int], T]) -> Stored[T]:
    # Read and not mapped: what is mapped counts as memory of the process, gigabytes of it in the end.
    file = pa.ipc.open_file(pa.OSFile(str(path)))
    number = file.num_record_batches
    count = (number - 1) * _BATCH + file.get_batch(number - 1).num_rows if number else 0
    return Stored(lru_cache(maxsize=_BATCHES_KEPT)(file.get_batch), read, np.arange(count))


def _read_example(batch: pa.RecordBatch, index: int) -> Example:
    messages, domain, source, licence = json.loads(batch.column(0)[index].as_py())
    turns = tuple(Message(role=role, content=content) for role, content in messages)
    return Example(messages=turns, domain=domain, source=source, licence=licence)


def _read_row(batch: pa.RecordBatch, index: int) -> TokenizedRow:
    ids, labels = (tuple(batch.column(name)[index].values.to_numpy().tolist()) for name in ("input_ids", "labels"))
    return TokenizedRow(input_ids=ids, labels=labels, domain=batch.column("domain")[index].as_py())


class Rows(Sequence[TokenizedRow]):
    """Rows of which length and domain are known without reading them.

    Attributes:
        lengths: Tokens of each row.
        domains: Index of each row's domain.
    """

    def __init__(self, rows: Sequence[TokenizedRow], lengths: NDArray[np.int32], domains: NDArray[np.int32]) -> None:
        self._rows, self.lengths, self.domains = rows, lengths, domains

    @classmethod
    def of(cls, rows: Iterable[TokenizedRow]) -> "Rows":
        """Rows in memory."""
        rows = list(rows)
        lengths, domains = [len(row) for row in rows], [row.domain for row in rows]
        return cls(rows, np.array(lengths, dtype=np.int32), np.array(domains, dtype=np.int32))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...

    @overload
    def __getitem__(self, index: slice) -> "Rows": ...

    def __getitem__(self, index: int | slice) -> "TokenizedRow | Rows":
        if isinstance(index, slice):
            return Rows(self._rows[index], self.lengths[index], self.domains[index])
        return self._rows[index]

    def __iter__(self) -> Iterator[TokenizedRow]:
        return iter(self._rows)

    def of_domain(self, domain: int) -> NDArray[np.int64]:
        """Indices of the rows of a domain."""
        return np.flatnonzero(self.domains == domain)
