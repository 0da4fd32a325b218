"""Servers with OpenAI's chat interface: one model on one machine or on several."""

import asyncio
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from dylora_moe.errors import GeneratorError
from dylora_moe.generate.clients.base import Failure, Reply, Request
from dylora_moe.generate.questions import clean_text

# No request to this address, with this key or of this model will be taken.
_REFUSED = {401, 403, 404, 405}
# This request will not be.
_UNFIT = {400, 413, 422}
# Of the reasons why an answer ends, those by which it is not cut off; some servers give none.
_WHOLE = {None, "stop", "eos", "eos_token", "end_turn", "stop_sequence"}
_MAX_REPLY_BYTES, _MOST_TOKENS = 4_000_000, 10**8
_CONNECT_S = 10.0


class EndpointClient:
    """Sends each request to the machine with the fewest in flight; one that failed comes last for a while.

    Args:
        urls: Addresses as vLLM and others print them, `http://host:8000/v1`.
        model: As the servers call it.
        key_variable: Name of the environment variable that holds the key; no key is sent where it is not set.
        timeout_s: Longest wait for one answer.
        in_flight: Connections to hold.
        requests_per_minute: Not to be exceeded, over all machines; None for no limit.
        patience_s: Longest that all machines may ask to be left alone.

    Raises:
        GeneratorError: The key cannot be sent.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        key_variable: str,
        timeout_s: float,
        in_flight: int,
        requests_per_minute: float | None = None,
        patience_s: float = math.inf,
    ) -> None:
        key = os.environ.get(key_variable, "").strip()
        if not key.isascii() or not key.isprintable():
            raise GeneratorError(
                f"the key in the environment variable {key_variable} must be of printable ASCII characters, and it is "
                "not. Set it again."
            )
        self._model, self._key_variable = model, key_variable
        self._machines = [_Machine(url.rstrip("/")) for url in urls]
        self._pace = _Pace(requests_per_minute)
        self._in_flight, self._patience_s = in_flight, patience_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(_CONNECT_S, timeout_s))
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http: aiohttp.ClientSession | None = None

    async def complete(self, request: Request) -> Reply:
        """One answer of the least busy machine; see `Client`."""
        if self._http is None:
            connector = aiohttp.TCPConnector(limit=self._in_flight)
            self._http = aiohttp.ClientSession(connector=connector, timeout=self._timeout, headers=self._headers)
        await self._pace.turn()
        now = time.monotonic()
        machine = min(
            self._machines,
            key=lambda each: (max(each.asked_until, now), each.rests_until > now, each.in_flight, each.failures),
        )
        if (rest := machine.asked_until - now) > self._patience_s:
            raise GeneratorError(
                f"{machine.url} must take requests within the patience of {self._patience_s:.0f} s, and it asks to be "
                f"left alone for {rest:.0f} s. Nothing is lost: start the same command then."
            )
        if rest > 0:
            await asyncio.sleep(rest)
        machine.in_flight += 1
        try:
            reply = await self._ask(self._http, machine.url, request)
        except Failure as failure:
            if not failure.is_final:
                machine.rest(failure.wait_s)
            raise
        finally:
            machine.in_flight -= 1
        machine.failures = 0
        return reply

    async def close(self) -> None:
        """Let go of connections; the next request makes new ones."""
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _ask(self, http: aiohttp.ClientSession, url: str, request: Request) -> Reply:
        body = {
            "model": self._model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        try:
            async with http.post(f"{url}/chat/completions", json=body, allow_redirects=False) as response:
                status, content = response.status, await _read(response, url)
        except asyncio.TimeoutError as error:
            raise Failure("no answer in time", where=url) from error
        except aiohttp.InvalidURL as error:
            raise GeneratorError(f"{url} must be an address such as http://localhost:8000/v1: {error}.") from error
        except aiohttp.ClientError as error:
            raise Failure(f"connection: {type(error).__name__}", where=url) from error
        said = clean_text(content.decode("utf-8", "replace"))[0][:300]
        if status in _REFUSED:
            raise GeneratorError(self._refusal(url, status, said))
        if 300 <= status < 400:
            raise GeneratorError(
                f"{url} must answer itself, and it sends requests on to {response.headers.get('location')!r} (HTTP "
                f"{status}). Give that address, if it is yours."
            )
        if status in _UNFIT:
            raise Failure(f"HTTP {status}", where=url, said=said, is_final=True)
        if status != 200:
            wait = _retry_after(response.headers.get("retry-after"))
            raise Failure(f"HTTP {status}", where=url, said=said, wait_s=wait)
        return _parse(content, url)

    def _refusal(self, url: str, status: int, said: str) -> str:
        todo = {
            401: f"Set the environment variable {self._key_variable} to a key that it takes.",
            403: f"Set the environment variable {self._key_variable} to a key that may use this model.",
            404: "Look whether the address ends as the server says (often /v1), and whether it has this model.",
        }.get(status, "It says why.")
        return f"{url} must take requests for {self._model}, and it refuses them with HTTP {status}: {said!r}. {todo}"


class _Machine:
    """One address: what it is busy with, and how long others are taken before it after failures in a row.

    Attributes:
        rests_until: Others come first; where there are none it is asked all the same.
        asked_until: It asked to be left alone.
    """

    def __init__(self, url: str) -> None:
        self.url, self.in_flight, self.failures, self.rests_until, self.asked_until = url, 0, 0, 0.0, 0.0

    def rest(self, asked: float | None) -> None:
        self.failures += 1
        # One lost request of many says nothing about the machine; several in a row do.
        own = 0.0 if self.failures < 3 else min(30.0, 0.05 * 2 ** min(self.failures, 10))
        now = time.monotonic()
        self.rests_until = now + max(asked or 0.0, own)
        if asked:
            self.asked_until = now + asked


class _Pace:
    """Lets requests through at most so often."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        if not self._gap:
            return
        now = time.monotonic()
        at = max(self._next, now)
        self._next = at + self._gap
        await asyncio.sleep(at - now)


async def _read(response: aiohttp.ClientResponse, url: str) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > _MAX_REPLY_BYTES:
            raise Failure("an answer of more than 4 MB", where=url)
        parts.append(part)
    return b"".join(parts)


def _parse(content: bytes, url: str) -> Reply:
    try:
        record = json.loads(content)
        choice = record["choices"][0]
        text, usage = choice["message"]["content"], record.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError("content is no text")
        return Reply(
            text=text.encode("utf-8", "replace").decode(),  # halves of surrogate pairs, which JSON can spell
            is_whole=choice.get("finish_reason") in _WHOLE,
            tokens_in=_count(usage, "prompt_tokens"),
            tokens_out=_count(usage, "completion_tokens"),
            where=url,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Failure("a malformed answer", where=url) from error


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a number of them or a date; what is neither is no wish."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
