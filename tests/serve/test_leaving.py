"""Streams whose clients leave at odd moments."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from dylora_moe.serve.leaving import EventStream


def test_a_client_that_leaves_before_the_first_event_ends_it_all() -> None:
    ended: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
        finally:
            ended.append("generator")

    async def serve() -> None:
        async def send(message: Any) -> None:
            await asyncio.Event().wait()  # the client reads nothing, not even what came before

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        await EventStream(events(), at_end=lambda: ended.append("end"))({"type": "http"}, receive, send)

    asyncio.run(asyncio.wait_for(serve(), 30))
    assert ended == ["end"]
