"""Which files of a path hold rows, and what reads each kind."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dylora_moe.data.languages import language_code
from dylora_moe.data.readers.json_files import json_lines_rows, json_rows
from dylora_moe.data.readers.rows import BadRow, OnBad, stop_at
from dylora_moe.data.readers.tables import arrow_rows, csv_rows, parquet_rows, tsv_rows
from dylora_moe.data.readers.texts import aligned_pair, aligned_rows, text_rows
from dylora_moe.errors import DataError

_TEXT_KINDS = {
    ".json": json_rows,
    ".jsonl": json_lines_rows,
    ".ndjson": json_lines_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".txt": text_rows,
}
_READERS = {
    **_TEXT_KINDS,
    **{f"{suffix}.gz": read for suffix, read in _TEXT_KINDS.items()},
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
SUFFIXES = tuple(_READERS)
LABELS_FILE = "labels.json"
# What stands beside the rows in a folder that `datasets` saved, or that has a label list.
_NO_ROWS = {LABELS_FILE, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def suffix_of(path: Path) -> str | None:
    """The supported suffix that a file's name ends in, or None."""
    # Longest first, so that `x.json.gz` is not taken for another kind.
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), None)


def stem_of(path: Path) -> str:
    """A file's name without its suffix, or a folder's name."""
    path = Path(os.path.abspath(path))  # of a link its own: a hub's cache links to files named by their hash
    if language_code(path.suffix[1:]) and not path.is_dir():
        return path.stem
    return path.name[: -len(suffix)] or path.name if (suffix := suffix_of(path)) else path.name


def list_files(path: Path) -> list[Path]:
    """The file itself, or a folder's data files sorted by name; other files (a README) are left out.

    Of two aligned files one stands for both. Text files count only in a folder of nothing else, where they are more
    likely rows than notes.

    Raises:
        DataError: The path does not exist, is of an unknown kind, cannot be printed, or the folder holds no data file.
    """
    if not path.exists():
        raise DataError(f"A data file must exist, got {str(path)!r}. Give the path of a file or folder.")
    if not path.is_dir():
        if suffix_of(path) is None and language_code(path.suffix[1:]) is None:
            raise DataError(
                f"A data file must end in one of {', '.join(SUFFIXES)}, or be one of two aligned files such as "
                f"pairs.eng and pairs.ita, got {str(path)!r}. Convert or rename it."
            )
        return _printable([path])
    inside = sorted(file for file in path.iterdir() if file.is_file() and file.name not in _NO_ROWS)
    files = [file for file in inside if suffix_of(file) or (aligned_pair(file) or (None,))[0] == file]
    others = [file for file in files if not (suffix_of(file) or "").startswith(".txt")]
    if not files:
        raise DataError(f"A data folder must hold files ending in one of {', '.join(SUFFIXES)}, got {path}.")
    return _printable(others or files)


def _printable(files: list[Path]) -> list[Path]:
    """These files, whose names can be told in messages and records."""
    for file in files:
        if not str(file).isprintable():
            raise DataError(f"The name of a data file must be text that can be printed, got {str(file)!r}. Rename it.")
    return files


def read_rows(path: Path, on_bad: OnBad = stop_at) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, or of all data files of a folder, as (place, row); both count from 1.

    All are read a piece at a time, but for an object in a .json file.

    Args:
        path: A file or folder.
        on_bad: What to do about a line or row that is none; the default stops.

    Raises:
        DataError: A file is missing, empty, not of a known kind, or broken; with the line where there is one.
    """
    for file in list_files(path):
        yield from _read_file(file, on_bad)


def _read_file(file: Path, on_bad: OnBad) -> Iterator[tuple[str, dict[str, Any]]]:
    read = _READERS.get(suffix_of(file) or "", aligned_rows)
    num_rows = 0
    for where, row in read(file, on_bad):
        num_rows += 1
        if isinstance(row, Mapping):
            yield where, dict(row)
        else:
            reason = f"a row must be an object with named columns, got {type(row).__name__}."
            on_bad(BadRow(where=where, reason=reason, row=row))
    if num_rows == 0:
        raise DataError(f"{file}: a data file must hold at least one row, got none. Fill it or leave it out.")


def files_read(path: Path) -> list[Path]:
    """Every file that the rows of a file or folder come from: data files, their translations, label lists.

    Raises:
        DataError: As `list_files`.
    """
    found: dict[Path, None] = {}
    for file in list_files(path):
        found |= dict.fromkeys(aligned_pair(file) or (file,))
        found |= dict.fromkeys(each for each in (file.parent / LABELS_FILE,) if each.is_file())
    return list(found)


def read_labels(file: Path) -> tuple[str, ...] | None:
    """The label list beside a data file (`labels.json`, a list of names), or None where there is none.

    Raises:
        DataError: It is no list of different names.
    """
    beside = file.parent / LABELS_FILE
    if not beside.is_file():
        return None
    names: list[str] = []
    for where, name in json_rows(beside, stop_at):
        if not isinstance(name, str) or not name.strip() or name in names:
            raise DataError(f"{where}: a label list must hold different names, got {name!r}. Mend the file.")
        names.append(name)
    return tuple(names)
