"""What is asked of the engine, what it gives, and how it fails."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from dylora_moe.errors import ServeError
from dylora_moe.evaluate.load import Speaker

Finish = Literal["stop", "length", "cancelled"]


class Full(ServeError):
    """As many requests wait as may; another can be sent later."""


class TooLong(ServeError):
    """A request that will never have room."""


class TimedOut(ServeError):
    """A request that was not answered in its time."""


class Closed(ServeError):
    """The engine takes no more requests."""


class Broken(ServeError):
    """A pass failed, and with it the requests in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to make.

    Attributes:
        prompt: Token ids, or text as a chat template wrote it, special tokens and all.
        speaker: Who answers: routed, base or one expert.
        max_tokens: Longest answer, its end token counted.
        temperature: 0 for the likeliest token each time.
        top_p: Share of the probability to draw from.
        seed: Of the draw: the same seed, the same answer. None for another one each time.
        stop: Strings before which the answer ends.
        end_token_ids: Tokens with which it ends.
        logprobs: How many of the likeliest tokens to tell with each token; None for no log probabilities.
        client: Whose it is; one client's requests do not keep those of others waiting.
        timeout_s: Longest time from submission to the end; None for no limit.
    """

    prompt: str | Sequence[int]
    speaker: Speaker
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    end_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    client: str = ""
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": (self.max_tokens >= 1, "at least 1", self.max_tokens),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more", self.temperature),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1", self.top_p),
            "speaker": (self.speaker.kind != "dense", "routed, base or one expert", self.speaker.kind),
        }
        for name, (holds, wanted, got) in bounds.items():
            if not holds:
                raise ServeError(f"{name} must be {wanted}, got {got}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token of an answer, or its end."""

    text: str
    """What can be shown now: no half characters, and nothing of a stop string."""
    token_id: int | None
    """None where an answer ended with no token of its text, such as an end token."""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    """Of the likeliest tokens; None where they were not asked for, as `logprob`."""
    experts: dict[str, float] | None = None
    """Weight of each expert in the pass that wrote the token, the mean over layers; none where no skill was near
    enough and the base served. None where the base was asked alone."""
    finish: Finish | None = None
    """Why the answer ends with this piece; None where it goes on."""


class Stream:
    """The pieces of one answer as they come, for one reader, in a thread or in asyncio.

    Attributes:
        prompt_tokens: That were read.
        completion_tokens: That were written so far, an end token and those of a stop string counted.
    """

    def __init__(self, prompt_tokens: int, on_cancel: Callable[[], None]) -> None:
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.is_cancelled = False
        self._on_cancel = on_cancel
        self._pieces: deque[Piece | ServeError] = deque()
        self._arrived = threading.Condition()
        self._wake: Callable[[], object] | None = None

    def cancel(self) -> None:
        """Let the rest go; where the answer had not ended, a piece with finish `cancelled` ends it."""
        self.is_cancelled = True
        self._on_cancel()

    def put(self, *pieces: Piece | ServeError) -> None:
        """Called by the engine; an error, or a piece with a finish, is the last."""
        with self._arrived:
            self._pieces.extend(pieces)
            self._arrived.notify()
            wake = self._wake
        if wake is not None:
            wake()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._arrived:
                while not self._pieces:
                    self._arrived.wait()
                piece = self._pieces.popleft()
            if isinstance(piece, ServeError):
                raise piece
            yield piece
            if piece.finish is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed, and its reader gone
                loop.call_soon_threadsafe(arrived.set)

        with self._arrived:
            self._wake = wake
        while True:
            arrived.clear()
            with self._arrived:
                pieces = list(self._pieces)
                self._pieces.clear()
            for piece in pieces:
                if isinstance(piece, ServeError):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
            if not pieces:
                await arrived.wait()
