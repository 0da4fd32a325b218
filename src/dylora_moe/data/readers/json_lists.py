"""The values of a JSON list, one at a time, whatever the size of the file."""

import codecs
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import BinaryIO

from dylora_moe.data.readers.lines import BOM, MAX_LINE_BYTES, not_utf8
from dylora_moe.errors import DataError

_PIECE = 2**18
# A value that goes on after the text that is there is an error near its end, an open string, or a shorter number. The
# message on open strings is the same in CPython 3.10 to 3.14.
_NEAR_END = 16
_SPACE = re.compile(r"[ \t\n\r]*")


def read_list(file: Path, stream: BinaryIO) -> Iterator[object]:
    """The values of a list.

    Args:
        file: Its name, for errors.
        stream: Its bytes from the first on, which is that of a list or a blank.

    Raises:
        DataError: The text is no list, with line and column, no UTF-8, or has a value of more than `MAX_LINE_BYTES`
            characters.
    """
    text = _Text(file, stream)
    if not text.skip("["):
        raise text.broken("must be a list of objects. Mend the file there.")
    if not text.skip("]"):
        yield text.value()
        while text.skip(","):
            if text.peek() == "]":
                raise text.broken("a comma stands before the ']' that ends the list. Remove it.")
            yield text.value()
        if not text.skip("]"):
            raise _not_closed(text)
    if text.peek():
        raise text.broken("not valid JSON (something follows the list). Remove it.")


def _not_closed(text: "_Text") -> DataError:
    if not text.peek():
        return text.broken(
            "the list opened with '[' is never closed. Add ']' at the end, or fetch the whole file again."
        )
    other = text.broken("not valid JSON (Expecting ',' delimiter). Mend the file there.")
    closed = text.broken("the list opened with '[' is closed with '}'. Replace the last '}' by ']'.")
    return closed if text.skip("}") and not text.peek() else other


class _Text:
    """The text of a stream, of which only the piece that is looked at is there, and where in the file that is."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._is_start, self._is_whole = "", 0, True, False
        self._num_bytes, self._line, self._column = 0, 1, 1

    def peek(self) -> str:
        """The next character that is no blank; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def skip(self, character: str) -> bool:
        """Pass over the next character if it is this one, and say whether it was."""
        is_next = self.peek() == character
        self._at += is_next
        return is_next

    def value(self) -> object:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                if not (is_cut and self._read()):
                    self._at = error.pos
                    raise self.broken(f"not valid JSON ({error.msg}). Mend the file there.") from error
            except RecursionError as error:
                raise self.broken(f"values must not be nested this deep ({error}). Flatten the rows.") from error
            except ValueError as error:  # an integer of thousands of digits
                raise self.broken(f"not valid JSON ({error}). Write the number as text.") from error
            else:
                if end < len(self._text) - _NEAR_END or not self._read():  # a number may go on
                    self._at = end
                    return value

    def broken(self, advice: str) -> DataError:
        """An error at the next character."""
        self._pass()
        return DataError(f"{self._file}, line {self._line}, column {self._column}: {advice}")

    def _read(self) -> bool:
        """More of the text, as much again as there is; False at its end."""
        if self._is_whole:
            return False
        self._pass()
        if len(self._text) > MAX_LINE_BYTES:
            raise self.broken(f"a row must be at most {MAX_LINE_BYTES >> 20} Mi characters, got more. Split it.")
        data = self._stream.read(max(_PIECE, len(self._text)))
        waiting = len(self._decoder.getstate()[0])
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(str(self._file), error, before=self._num_bytes - waiting) from error
        if self._is_start and self._text:
            self._text, self._is_start = self._text.removeprefix(BOM), False
        self._num_bytes += len(data)
        self._is_whole = not data
        return True

    def _pass(self) -> None:
        """Forget the text before the place that is looked at."""
        done, self._text, self._at = self._text[: self._at], self._text[self._at :], 0
        self._line += done.count("\n")
        self._column = len(done) - done.rfind("\n") if "\n" in done else self._column + len(done)
