"""What is asked of a generator, what it gives, and how it fails."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dylora_moe.data.example import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to make.

    Attributes:
        messages: The instructions first, the question last.
        max_tokens: Longest answer.
        temperature: Of sampling.
        top_p: Share of the probability to draw from.
        seed: Of the draw, where the generator takes one.
    """

    messages: Sequence[Message]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer as it came.

    Attributes:
        text: Of the model, nothing cut from it.
        is_whole: False where it was cut at max_tokens.
        tokens_in: That were read, as the generator counts them; None where it does not say.
        tokens_out: That were written, likewise.
        where: Which machine wrote it.
    """

    text: str
    is_whole: bool
    tokens_in: int | None
    tokens_out: int | None
    where: str


class Failure(Exception):
    """A request that got no answer.

    Attributes:
        reason: In a few words, the same for the same fault.
        where: Which machine failed.
        said: What it said of it, in its own words, which may be different each time.
        wait_s: Seconds that it asks to be left alone; None where it does not say.
        is_final: Whether this request will never get one, such as one that is too long.
    """

    def __init__(
        self, reason: str, *, where: str, said: str = "", wait_s: float | None = None, is_final: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.where, self.said, self.wait_s, self.is_final = reason, where, said, wait_s, is_final


class Client(Protocol):
    """A generator that takes several requests at a time."""

    async def complete(self, request: Request) -> Reply:
        """One answer.

        Raises:
            Failure: There is none this time.
            GeneratorError: There will be none: wrong key, unknown model, no such address.
        """
        ...

    async def close(self) -> None:
        """Let go of what belongs to the event loop; requests may come again in another one."""
        ...
