"""A text file, gzipped or not -> its lines, one at a time, whatever the size of the file."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from dylora_moe.errors import DataError

BOM = "\ufeff"  # files saved on Windows may begin with it
# A line is one row; the longest of real data sets are under 1 MiB. Bounds the memory that a file can take.
MAX_LINE_BYTES = 64 * 2**20


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """A file to read bytes from, unpacked where its name ends in .gz.

    Raises:
        DataError: It cannot be opened, or reading inside the block fails.
    """
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            yield cast(BinaryIO, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}). Check the file and its permissions.") from error


def decode(data: bytes, *, where: str, start: bool) -> str:
    """UTF-8 bytes as text, without the byte order mark that a file may `start` with.

    Raises:
        DataError: With the first byte that is no UTF-8 and its offset in `data`.
    """
    try:
        return data.decode("utf-8").removeprefix(BOM if start else "")
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error


def not_utf8(where: str, error: UnicodeDecodeError, *, before: int = 0) -> DataError:
    """What is told of bytes that are no UTF-8, with so many `before` those that were decoded."""
    offset = before + error.start
    return DataError(
        f"{where}: text must be UTF-8, got byte {error.object[error.start]:#04x} at offset {offset}. "
        "Save the file as UTF-8."
    )


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    r"""The lines with their ends, numbered from 1; only \n ends a line, as JSON allows the others in a string.

    Raises:
        DataError: The file cannot be read, is no UTF-8, or has a line above `MAX_LINE_BYTES`.
    """
    number = 0
    with open_bytes(file) as stream:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{file}, line {number}: a line must be at most {MAX_LINE_BYTES >> 20} MiB, got more. "
                    "Write one row a line; a file with one list of all rows is .json."
                )
            yield number, decode(line, where=f"{file}, line {number}", start=number == 1)
