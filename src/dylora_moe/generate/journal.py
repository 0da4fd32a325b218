"""The log of a generation: one JSON line for all that happened to a row, never changed, only added to."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dylora_moe.errors import RunError


class Journal:
    """Open for adding inside a `with` block. A line that a kill cut off is cut away first: it never counted.

    Raises:
        RunError: The file cannot be read or written, or a line in its middle is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "Journal":
        try:
            self._file = self.path.open("ab", buffering=0)
            whole = self._whole_bytes()
            if whole < self.path.stat().st_size:
                os.truncate(self.path, whole)
        except OSError as error:
            raise RunError(f"the log {self.path} must be a file that can be written: {error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, event: Mapping[str, Any]) -> None:
        """Write one event; it is in the system's hands when this returns, so that a kill does not lose it."""
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        written = self._file.write(line)
        if written != len(line):  # a full disk
            raise OSError(28, os.strerror(28), str(self.path))

    def events(self) -> Iterator[dict[str, Any]]:
        """All events so far, in their order."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    event = json.loads(line)
                    if not isinstance(event, dict) or not {"id", "kind"} <= event.keys():
                        raise ValueError("it has no id and kind")
                    yield event
                except ValueError as error:
                    raise RunError(
                        f"line {number} of {self.path} must be a JSON object, and it is broken: {error}. Bring the "
                        "file back, or cut it before this line: what is after it is made again."
                    ) from error

    def _whole_bytes(self) -> int:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end:
                start = max(0, end - 65536)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    return start + found + 1
                end = start
        return 0
