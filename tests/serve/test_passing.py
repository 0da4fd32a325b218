"""Streams of other servers: whole events, however the bytes come, and their tokens."""

import json
from typing import Any

import pytest

from dylora_moe.serve.passing import Passing, tokens_of

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def events(*data: Any) -> list[bytes]:
    return [b"data: " + json.dumps(one, ensure_ascii=False).encode() for one in data]


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("keeps", [True, False])
def test_events_pass_and_usage_is_read(size: int, end: bytes, keeps: bool) -> None:
    first, word, last = events(
        {"choices": [{"delta": {"content": "é"}}], "usage": None},
        {"choices": [{"delta": {"content": "usage"}}]},
        {"choices": [], "usage": USAGE},
    )
    written = [b": a comment", first, word, b'data: "usage" of no JSON', last, b"data: [DONE]"]
    whole = b"".join(one + end for one in written) + b"data: half"
    passing = Passing(keeps_usage=keeps)
    given = [one for at in range(0, len(whole), size) for one in passing.add(whole[at : at + size])]
    assert given == [one + end for one in written if keeps or one is not last]
    assert passing.rest() == b"data: half" and passing.rest() == b""
    assert passing.tokens == (7, 3)


def test_usage_beside_a_choice_is_passed_on() -> None:
    (event,) = events({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE})
    passing = Passing(keeps_usage=False)
    assert list(passing.add(event + b"\n\n")) == [event + b"\n\n"] and passing.tokens == (7, 3)


def test_an_event_that_never_ends_is_not_kept() -> None:
    passing = Passing(keeps_usage=False)
    assert sum(len(given) for _ in range(40) for given in passing.add(b"x" * 65_536)) > 1_000_000
    assert len(passing.rest()) <= 1_000_000


def test_odd_usage_is_no_fault() -> None:
    assert [tokens_of(odd) for odd in (None, [], {}, {"usage": 3})] == [None] * 4
    assert tokens_of({"usage": {"prompt_tokens": "x", "completion_tokens": -1}}) == (0, 0)
