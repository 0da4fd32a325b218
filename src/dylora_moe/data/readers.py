"""A local file or folder -> rows, each with the place where it stands, for errors that can be acted on."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from dylora_moe.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".json.gz", ".jsonl.gz", ".ndjson.gz")
_PARQUET_BATCH_ROWS = 1024


def suffix_of(path: Path) -> str | None:
    """The supported suffix that a file's name ends in, or None."""
    # Longest first, so that `x.json.gz` is not taken for another kind.
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), None)


def stem_of(path: Path) -> str:
    """A file's name without its suffix, or a folder's name."""
    name = Path(os.path.abspath(path)).name  # of a link its own: a hub's cache links to files named by their hash
    return name[: -len(suffix)] or name if (suffix := suffix_of(path)) else name


def list_files(path: Path) -> list[Path]:
    """The file itself, or a folder's data files sorted by name; other files (a README) are left out.

    Raises:
        DataError: The path does not exist, is of an unknown kind, or the folder holds no data file.
    """
    if not path.exists():
        raise DataError(f"A data file must exist, got {str(path)!r}. Give the path of a file or folder.")
    if not path.is_dir():
        if suffix_of(path) is None:
            raise DataError(
                f"A data file must end in one of {', '.join(SUFFIXES)}, got {str(path)!r}. Convert or rename it."
            )
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and suffix_of(file))
    if not files:
        raise DataError(f"A data folder must hold files ending in one of {', '.join(SUFFIXES)}, got {path}.")
    return files


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, or of all data files of a folder, as (place, row); both count from 1.

    Raises:
        DataError: A file is missing, empty, not of a known kind, or broken; with the line where there is one.
    """
    for file in list_files(path):
        yield from _read_file(file)


def _read_file(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    suffix = suffix_of(file) or ""
    if suffix == ".parquet":
        rows = _parquet_rows(file)
    elif suffix in (".json", ".json.gz"):
        rows = _json_rows(file)
    else:
        rows = _json_lines_rows(file)
    num_rows = 0
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row must be an object with named columns, got {type(row).__name__}.")
        num_rows += 1
        yield where, row
    if num_rows == 0:
        raise DataError(f"{file}: a data file must hold at least one row, got none. Fill it or leave it out.")


def _read_text(file: Path) -> str:
    try:
        if file.name.lower().endswith(".gz"):
            with gzip.open(file, "rb") as stream:
                data = stream.read()
        else:
            data = file.read_bytes()
        # Files saved on Windows may start with a byte order mark, which is no JSON.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: text must be UTF-8, got byte {error.object[error.start]:#04x} at offset {error.start}. "
            "Save the file as UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}). Check the file and its permissions.") from error


def _json_rows(file: Path) -> Iterator[tuple[str, object]]:
    text = _read_text(file)
    if not text.strip():
        raise DataError(f"{file}: a JSON file must hold a list of objects, but the file is empty.")
    try:
        content = json.loads(text)
    except JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}, column {error.colno}: {_advice(text, error)}") from error
    where = str(file)
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(
                f"{file}: must be a list of objects, or an object that holds exactly one list; got an object "
                f"with {len(lists)} lists among its keys {', '.join(list(content)[:8])}. Keep one list."
            )
        where, content = f"{file}, key {lists[0]!r}", content[lists[0]]
    if not isinstance(content, list):
        raise DataError(f"{file}: must be a list of objects, got {type(content).__name__}.")
    for index, row in enumerate(content, start=1):
        yield f"{where}, row {index}", row


def _advice(text: str, error: JSONDecodeError) -> str:
    """What is wrong with a JSON text and what to do about it."""
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("}") and not text[error.pos + 1 :].strip():
        if text[error.pos : error.pos + 1] == "}":
            return "the list opened with '[' is closed with '}'. Replace the last '}' by ']'."
        return "the list opened with '[' is never closed. Add ']' at the end, or fetch the whole file again."
    if error.msg == "Extra data" and stripped.startswith("{"):
        return "a second value follows the first. If every line is a row, rename the file to .jsonl."
    return f"not valid JSON ({error.msg}). Mend the file there."


def _json_lines_rows(file: Path) -> Iterator[tuple[str, object]]:
    # Not str.splitlines: it also breaks at characters that JSON allows inside a string.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except JSONDecodeError as error:
            raise DataError(
                f"{file}, line {number}, column {error.colno}: not valid JSON ({error.msg}). Every line must "
                "be one object; mend or remove the line. A file with one list over many lines is .json."
            ) from error
        yield f"{file}, line {number}", row


def _parquet_rows(file: Path) -> Iterator[tuple[str, object]]:
    # Only this kind of file needs pyarrow, which takes a second to import.
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_PARQUET_BATCH_ROWS)
        index = 0
        for batch in batches:
            for row in batch.to_pylist():
                index += 1
                yield f"{file}, row {index}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({error}). Fetch or write it again.") from error
