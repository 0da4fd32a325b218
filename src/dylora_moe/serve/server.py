"""A run -> a server that listens, until a signal lets it finish what it began."""

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from dylora_moe.errors import ServeError
from dylora_moe.serve.app import Answers
from dylora_moe.serve.guard import Guard


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ServeError: The address or port cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ServeError(
            f"{host}:{port} must be free for the server to listen, and it is not: {error}. Choose another --port."
        ) from error


def make_server(app: Guard, answers: Answers, *, grace_s: float, ready: Callable[[], None]) -> "GracefulServer":
    """A server to be run on a socket; until SIGTERM or Ctrl-C, after which what was begun is finished.

    Args:
        app: Behind its guard.
        answers: What answers.
        grace_s: Longest time to finish in; a second signal ends it at once.
        ready: Called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        http="h11",  # the one that is tested; another is taken where it happens to be installed
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=65_536,
    )
    return GracefulServer(config, answers, grace_s, ready)


class GracefulServer(uvicorn.Server):
    """Takes no new requests after a signal, and finishes the others."""

    def __init__(self, config: uvicorn.Config, answers: Answers, grace_s: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._answers, self._grace_s, self._ready = answers, grace_s, ready
        self._closing_since: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of a signal. New requests are told that the server closes, while the others go on."""
        if self._closing_since is not None:
            self._grace_s = 0.0
        else:
            self._closing_since = time.monotonic()
        self._answers.is_closing = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._ready()

    async def main_loop(self) -> None:
        """Until a signal, and then until all answers are complete or their time is over."""
        while self._closing_since is None or (
            self._answers.under_way and time.monotonic() < self._closing_since + self._grace_s
        ):
            await self.on_tick(0)
            await asyncio.sleep(0.1)
        self.should_exit = True
        # What is still under way is cut off here, and its clients are told.
        await self._answers.backend.close(0.0)
