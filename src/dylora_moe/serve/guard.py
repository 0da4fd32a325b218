"""What every request meets before the app: the host it asked for, its key, the size of its body; and no traceback."""

import asyncio
import hmac
import ipaddress
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dylora_moe.serve.schema import FAILED, ApiError, closing

logger = logging.getLogger(__name__)

OPEN = ("/", "/health", "/ready")
_BODY_S = 30.0
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class Guard:
    """Wraps an app.

    Args:
        app: That answers.
        key: Bearer token that requests must bring; None for none. `OPEN` paths need none.
        only_local: Answer only those who asked for this machine by a local name: a page of another site may have its
            name point here, and would be taken for this one.
        most_bytes: Of a body.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, only_local: bool, most_bytes: int) -> None:
        self._app, self._only_local, self._most_bytes = app, only_local, most_bytes
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name, value) for name, value in _HEADERS.items() if name not in own),
                ]
            await send(message)

        try:
            try:
                self._check(scope)
                body = await self._read(scope, receive)
                if body is None:  # the client left
                    return
                await self._app(scope, _replayed(body, receive), guarded)
            except ApiError as error:
                await error.response()(scope, receive, guarded)
        except asyncio.CancelledError:  # the server ends now, with nothing else to wait for
            if not started:
                await closing().response()(scope, receive, guarded)
        except Exception:  # of whatever kind: the client is told nothing of it
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not started:
                error = ApiError(500, FAILED, kind="server_error")
                await error.response()(scope, receive, guarded)

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._only_local and not is_local(_without_port(host)):
            raise ApiError(403, "this server answers on this machine only: ask for localhost or 127.0.0.1.")
        if self._key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                raise ApiError(
                    401,
                    "the header Authorization must bring the server's key as a bearer token, and it does not.",
                    kind="authentication_error",
                    code="invalid_api_key",
                )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most_bytes:
            raise self._too_large()
        parts, size, more = [], 0, True
        end = asyncio.get_running_loop().time() + _BODY_S
        while more:
            try:
                message = await asyncio.wait_for(receive(), end - asyncio.get_running_loop().time())
            except asyncio.TimeoutError as error:
                raise ApiError(408, f"a body must come within {_BODY_S:g} s.", kind="timeout_error") from error
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self._most_bytes:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a body must have at most {self._most_bytes} bytes. Send less.", code="body_too_large")


def is_local(host: str) -> bool:
    """Whether a name, or an address as it stands in an URL or by itself, is this machine's own and nobody else's."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    return host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever comes, such as the client's leaving."""
    message: dict[str, Any] | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal message
        if message is None:
            return await receive()
        now, message = message, None
        return now

    return replay
