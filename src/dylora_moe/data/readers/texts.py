"""Plain text, a document a block, and two files of sentences that are translations of each other, line by line."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from dylora_moe.data.languages import language_code
from dylora_moe.data.readers.lines import MAX_LINE_BYTES, read_lines
from dylora_moe.data.readers.rows import BadRow, OnBad, PlacedRow
from dylora_moe.errors import DataError


def text_rows(file: Path, on_bad: OnBad) -> Iterator[PlacedRow]:
    """Blocks between blank lines, each a row with one column `text`."""
    block: list[str] = []
    start = num_characters = 0
    for number, line in read_lines(file):
        if line.strip():
            start = start if block else number
            block.append(line)
            num_characters += len(line)
            if num_characters > MAX_LINE_BYTES:
                raise DataError(
                    f"{file}, line {start}: a document must be at most {MAX_LINE_BYTES >> 20} MiB, got more. "
                    "Put a blank line between documents."
                )
        elif block:
            yield f"{file}, line {start}", {"text": "".join(block).rstrip()}
            block, num_characters = [], 0
    if block:
        yield f"{file}, line {start}", {"text": "".join(block).rstrip()}


def aligned_pair(file: Path) -> tuple[Path, Path] | None:
    """A file and its translation, in the order of their names, or None.

    The two stand in one folder and differ in an ending that names a language: `pairs.eng` and `pairs.ita`.
    """
    if language_code(file.suffix[1:]) is None:
        return None
    found = sorted(
        other
        for other in file.parent.iterdir()
        if other.stem == file.stem and language_code(other.suffix[1:]) and other.is_file()
    )
    return (found[0], found[1]) if len(found) == 2 else None


def aligned_rows(file: Path, on_bad: OnBad) -> Iterator[PlacedRow]:
    """The lines of a file beside those of its translation: one column each, named by the files' endings.

    Raises:
        DataError: There is not exactly one translation, or one of the two has more lines.
    """
    pair = aligned_pair(file)
    if pair is None:
        raise DataError(
            f"{file}: aligned text must be two files in one folder whose names differ in a language at the end, "
            f"such as {file.stem}.eng and {file.stem}.ita. Add the other one, or leave just two."
        )
    first, second = pair
    names = (first.suffix[1:], second.suffix[1:])
    for one, other in zip_longest(read_lines(first), read_lines(second)):
        if one is None or other is None:
            shorter, longer = (first, second) if one is None else (second, first)
            number = (one or other or (0, ""))[0]
            raise DataError(
                f"{longer}, line {number}: aligned files must have equally many lines, but {shorter} ends at line "
                f"{number - 1}. Fetch both again."
            )
        where, row = f"{first}, line {one[0]}", dict(zip(names, (one[1].strip(), other[1].strip()), strict=True))
        if all(row.values()):
            yield where, row
        elif any(row.values()):
            reason = f"both files must have a sentence on a line, got {row}. Write or remove both."
            on_bad(BadRow(where=where, reason=reason, row=row))
