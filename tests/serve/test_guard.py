"""The guard before any app: clients that leave while they send, and a server that ends meanwhile."""

import asyncio
import json
from typing import Any

import pytest

from dylora_moe.serve.guard import Guard

SCOPE: Any = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [(b"host", b"localhost")]}


def serve(app: Any, received: list[Any], *, cancelled: asyncio.Event | None = None) -> list[Any]:
    """What is sent; where `cancelled` is given, the guard is cancelled once it is set."""
    sent: list[Any] = []

    async def receive() -> Any:
        return received.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        task = asyncio.ensure_future(Guard(app, key=None, only_local=True, most_bytes=100)(SCOPE, receive, send))
        if cancelled is not None:
            await cancelled.wait()
            task.cancel()
        await asyncio.wait_for(task, 30)

    asyncio.run(run())
    return sent


def test_half_a_body_is_no_request() -> None:
    async def app(*args: Any) -> None:
        pytest.fail("the client left")

    part = {"type": "http.request", "body": b"{}", "more_body": True}
    assert serve(app, [part, {"type": "http.disconnect"}]) == []


def test_who_is_cut_off_at_the_end_is_told_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    waits = asyncio.Event()

    async def app(*args: Any) -> None:
        waits.set()
        await asyncio.Event().wait()

    head, body = serve(app, [{"type": "http.request", "body": b"{}", "more_body": False}], cancelled=waits)
    assert head["status"] == 503 and json.loads(body["body"])["error"]["code"] == "closing"
    assert caplog.text == ""
