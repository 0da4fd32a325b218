"""Files of rows and columns: csv, tsv, Parquet, Arrow; a batch of rows at a time."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dylora_moe.data.readers.lines import MAX_LINE_BYTES, read_lines
from dylora_moe.data.readers.rows import BadRow, OnBad, PlacedRow
from dylora_moe.errors import DataError

_BATCH_ROWS = 256


def csv_rows(file: Path, on_bad: OnBad) -> Iterator[PlacedRow]:
    """Rows under a header, separated by commas."""
    return _separated_rows(file, on_bad, ",")


def tsv_rows(file: Path, on_bad: OnBad) -> Iterator[PlacedRow]:
    """Rows under a header, separated by tabs; cells may be quoted as in csv."""
    return _separated_rows(file, on_bad, "\t")


def _separated_rows(file: Path, on_bad: OnBad, separator: str) -> Iterator[PlacedRow]:
    # Strict, so that a quote that is never closed is an error and does not swallow the rest of the file.
    csv.field_size_limit(MAX_LINE_BYTES)  # the same for all of the process, and 128 KiB otherwise
    cells = csv.reader((line for _, line in read_lines(file)), delimiter=separator, strict=True)
    header = _next_cells(cells, file)
    while header == []:  # blank lines before it
        header = _next_cells(cells, file)
    if header is None:
        return
    if len(set(header)) < len(header) or not all(name.strip() for name in header):
        raise DataError(
            f"{file}, line {cells.line_num}: the first line must name every column once, got {', '.join(header)}. "
            "Add or mend the header."
        )
    while True:
        where = f"{file}, line {cells.line_num + 1}"
        row = _next_cells(cells, file)
        if row is None:
            return
        if len(row) == len(header):
            yield where, dict(zip(header, row, strict=True))
        elif row:
            reason = (
                f"a row must have {len(header)} cells as the header has ({', '.join(header)}), got {len(row)}. "
                "Quote cells that hold the separator."
            )
            on_bad(BadRow(where=where, reason=reason, row=row))


def _next_cells(cells: Any, file: Path) -> list[str] | None:
    start = cells.line_num + 1
    try:
        return next(cells, None)
    except csv.Error as error:
        raise DataError(
            f"{file}, line {start}: cells must be quoted as in csv, got an error up to line {cells.line_num} "
            f"({error}). Close the quotes, and double those inside a quoted cell."
        ) from error


def parquet_rows(file: Path, on_bad: OnBad) -> Iterator[PlacedRow]:
    """The rows of a Parquet file."""
    import pyarrow.parquet  # takes a second, and only such files need it

    with _readable(file, "Parquet"), pyarrow.parquet.ParquetFile(file, memory_map=True) as table:
        yield from _batch_rows(file, table.iter_batches(batch_size=_BATCH_ROWS))


def arrow_rows(file: Path, on_bad: OnBad) -> Iterator[PlacedRow]:
    """The rows of an Arrow file or stream (what `datasets` saves), or of a Feather file."""
    import pyarrow
    import pyarrow.ipc

    with _readable(file, "Arrow"), pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(source)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        # A batch on disk may be a whole file; slices of it share its memory.
        parts = (batch.slice(start, _BATCH_ROWS) for batch in batches for start in range(0, len(batch), _BATCH_ROWS))
        yield from _batch_rows(file, parts)


def _batch_rows(file: Path, batches: Any) -> Iterator[PlacedRow]:
    index = 0
    for batch in batches:
        for row in batch.to_pylist():
            index += 1
            yield f"{file}, row {index}", row


@contextmanager
def _readable(file: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises inside the block into one of our errors."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable {kind} file ({error}). Fetch or write it again.") from error
