"""JSON files: one value with a list of rows, or one row a line."""

import json
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import BinaryIO

from dylora_moe.data.readers.json_lists import read_list
from dylora_moe.data.readers.lines import BOM, decode, open_bytes, read_lines
from dylora_moe.data.readers.rows import BadRow, OnBad, PlacedRow
from dylora_moe.errors import DataError

# An object is parsed whole, which takes three to five times its size.
MAX_JSON_BYTES = 256 * 2**20
_NUM_CHARACTERS_KEPT = 10_000


def json_rows(file: Path, on_bad: OnBad) -> Iterator[PlacedRow]:
    """The rows of a list, of the only list in an object, or of objects that hold the rows by key.

    Raises:
        DataError: The file is broken (with line and column), holds no such list, or an object that is too large.
    """
    with open_bytes(file) as stream:
        is_list = _begins_list(stream)
    with open_bytes(file) as stream:
        if is_list:
            for index, row in enumerate(read_list(file, stream), start=1):
                yield f"{file}, row {index}", row
            return
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DataError(
            f"{file}: a .json file that holds no list must be at most {MAX_JSON_BYTES >> 20} MiB, since it is parsed "
            "whole, got more. Write a list of the rows, or one row a line (.jsonl); these have no limit."
        )
    text = decode(data, where=str(file), start=True)
    del data
    if not text.strip():
        raise DataError(f"{file}: a JSON file must hold a list of objects, but the file is empty.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(_broken(file, text, error)) from error
    del text
    yield from _rows_of(content, str(file))


def _begins_list(stream: BinaryIO) -> bool:
    start = stream.read(len(BOM.encode()))
    if start == BOM.encode():
        start = stream.read(1)
    while start.isspace():
        start = stream.read(1)
    return start.lstrip().startswith(b"[")


def _rows_of(content: object, where: str) -> Iterator[PlacedRow]:
    if isinstance(content, dict) and (groups := _keyed_rows(content)):
        for key, group in groups.items():
            for name, row in group.items():
                yield f"{where}, key {key!r}, row {name!r}", row
        return
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(
                f"{where}: must be a list of objects, or an object that holds exactly one list; got an object "
                f"with {len(lists)} lists among its keys {', '.join(list(content)[:8])}. Keep one list."
            )
        where, content = f"{where}, key {lists[0]!r}", content[lists[0]]
    if not isinstance(content, list):
        raise DataError(f"{where}: must be a list of objects, got {type(content).__name__}.")
    for index, row in enumerate(content, start=1):
        yield f"{where}, row {index}", row


def _keyed_rows(content: dict[str, object]) -> dict[str, dict[str, object]] | None:
    """Groups of rows by key, as CIMA has them: an object of objects of objects, and nothing else."""
    groups: dict[str, dict[str, object]] = {}
    for key, group in content.items():
        if not isinstance(group, dict) or not all(isinstance(row, dict) for row in group.values()):
            return None
        groups[key] = group
    return groups if any(groups.values()) else None


def _broken(file: Path, text: str, error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return f"{file}: values must not be nested this deep ({error}). Flatten the rows."
    if not isinstance(error, JSONDecodeError):  # an integer of thousands of digits
        return f"{file}: not valid JSON ({error}). Write the number as text."
    return f"{file}, line {error.lineno}, column {error.colno}: {_advice(text, error)}"


def _advice(text: str, error: JSONDecodeError) -> str:
    """What is wrong with a JSON text and what to do about it."""
    if error.msg == "Extra data" and text.lstrip().startswith("{"):
        return "a second value follows the first. If every line is a row, rename the file to .jsonl."
    return f"not valid JSON ({error.msg}). Mend the file there."


def json_lines_rows(file: Path, on_bad: OnBad) -> Iterator[PlacedRow]:
    """One row a line; blank lines are passed over, and a line that is no JSON is a bad row."""
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            column = f", column {error.colno}" if isinstance(error, JSONDecodeError) else ""
            what = error.msg if isinstance(error, JSONDecodeError) else str(error)
            reason = (
                f"not valid JSON ({what}). Every line must be one object; mend or remove the line. "
                "A file with one list over many lines is .json."
            )
            on_bad(
                BadRow(where=f"{file}, line {number}{column}", reason=reason, row=line[:_NUM_CHARACTERS_KEPT].rstrip())
            )
        else:
            yield f"{file}, line {number}", row
