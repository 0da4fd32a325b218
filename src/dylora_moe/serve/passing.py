"""A stream that another server writes -> its events one by one, and the tokens that it says it read and wrote."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

_END = re.compile(rb"\r?\n\r?\n")
# An event that does not end is passed on in parts.
_MOST_BYTES = 1_000_000


class Passing:
    """Events of one stream.

    Args:
        keeps_usage: Pass on the event that tells the tokens alone, which a client gets only where it asked for it.
    """

    def __init__(self, *, keeps_usage: bool) -> None:
        self._keeps_usage, self._rest = keeps_usage, b""
        self.tokens: tuple[int, int] | None = None
        """Read and written; None while that was not told."""

    def add(self, part: bytes) -> Iterator[bytes]:
        """What can be passed on with some more bytes."""
        *events, self._rest = _split(self._rest + part)
        for event in events:
            if self._is_passed(event):
                yield event
        if len(self._rest) > _MOST_BYTES:
            yield self.rest()

    def rest(self) -> bytes:
        """What is left at the end."""
        left, self._rest = self._rest, b""
        return left

    def _is_passed(self, event: bytes) -> bool:
        if b'"usage"' not in event:
            return True
        try:
            told = json.loads(event.strip().removeprefix(b"data:"))
        except ValueError:
            return True
        self.tokens = tokens_of(told) or self.tokens
        return self._keeps_usage or tokens_of(told) is None or bool(told.get("choices"))


def tokens_of(answer: Any) -> tuple[int, int] | None:
    """Tokens read and written, as an answer in OpenAI's shape tells them; None where it does not."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
    read, written = (count if isinstance(count, int) and count >= 0 else 0 for count in counts)
    return read, written


def _split(data: bytes) -> list[bytes]:
    """Events with their ends, and what comes after the last."""
    ends = [0, *(found.end() for found in _END.finditer(data))]
    return [*(data[start:end] for start, end in pairwise(ends)), data[ends[-1] :]]
