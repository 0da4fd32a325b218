"""Clients that leave before their answer is complete: what was made for them ends."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class Gone(Exception):
    """The client left."""


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives.

    Raises:
        Gone: The client left first; the work was cancelled.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for each in (task, leaving):
            if not each.done():
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each


class EventStream(Response):
    """Server-sent events; when the client leaves, the generator is closed.

    Args:
        events: What is sent.
        at_end: Called in the end, also where the client left before the generator began, whose own `finally` never
            runs then.
        headers: Beside the usual ones.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, at_end: Callable[[], None], headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._at_end = events, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or as many as are taken."""

        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with suppress(Gone, OSError):
                await while_there(receive, send_all())
        finally:
            self._at_end()
            await self._events.aclose()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
