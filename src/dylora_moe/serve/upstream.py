"""Answers by another server with OpenAI's interface that has the experts as models: we route, it writes."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from dylora_moe.errors import ServeError
from dylora_moe.evaluate.load import Speaker
from dylora_moe.serve.leaving import EventStream, Gone, while_there
from dylora_moe.serve.local import LEFT, explained, render_chat
from dylora_moe.serve.metrics import Metrics
from dylora_moe.serve.names import BASE_NAME
from dylora_moe.serve.passing import Passing, tokens_of
from dylora_moe.serve.request import Closed
from dylora_moe.serve.route import check_routable, route
from dylora_moe.serve.schema import ApiError, Body, ChatRequest
from dylora_moe.serve.shapes import event
from dylora_moe.tuner import DyLoraModel

KEY_VARIABLE = "DYLORA_UPSTREAM_KEY"
_CONNECT_S, _MOST_BYTES = 10.0, 32_000_000
# What comes over the wire of a stream while it is passed on.
_PART = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the other server is.

    Attributes:
        url: As it prints it, with or without `/v1`.
        key: Sent as a bearer token; None for none.
        timeout_s: Longest time for one answer.
    """

    url: str
    key: str | None
    timeout_s: float

    def path(self, path: str) -> str:
        """The address of one path below `/v1`."""
        root = self.url.rstrip("/").removesuffix("/v1")
        return f"{root}/v1/{path}"

    def session(self) -> aiohttp.ClientSession:
        """For many requests; to be closed."""
        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=min(_CONNECT_S, self.timeout_s)),
            connector=aiohttp.TCPConnector(limit=0),
        )


def find_models(address: Address, experts: Sequence[str], base: str) -> str:
    """Ask the other server what it has.

    Args:
        address: Of the server.
        experts: That it must have.
        base: Name of the base in the run.

    Returns:
        What it calls the base.

    Raises:
        ServeError: It cannot be reached, or lacks an expert, or its base cannot be told.
    """

    async def ask() -> Any:
        async with address.session() as http, http.get(address.path("models"), allow_redirects=False) as response:
            if response.status != 200:
                raise ServeError(f"{address.url} must list its models, and answers with HTTP {response.status}.")
            return json.loads(await response.content.read(_MOST_BYTES))

    try:
        listed = asyncio.run(ask())
        there = [str(model["id"]) for model in listed["data"]]
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError, TypeError) as error:
        raise ServeError(
            f"{address.url} must be a server with OpenAI's interface, and /v1/models gave {type(error).__name__}. "
            "Start it first, and look at the address."
        ) from error
    if missing := [name for name in experts if name not in there]:
        raise ServeError(
            f"{address.url} must have every expert as a model, and lacks {', '.join(missing)}. "
            "`dylora experts export RUN --for vllm` prints the command that loads them."
        )
    others = [name for name in there if name not in experts]
    choices = [name for name in (BASE_NAME, base) if name in others] or (others if len(others) == 1 else [])
    if not choices:
        raise ServeError(
            f"{address.url} must have the base as model {base!r} or {BASE_NAME!r}, and has {', '.join(there)}. "
            f"Give it that name there, such as by --served-model-name {BASE_NAME}."
        )
    return choices[0]


class Upstream:
    """Answers by another server.

    Args:
        model: Whose router decides.
        tokenizer: Of the base, with the run's template.
        address: Of the other server.
        base_name: What it calls the base.
        metrics: What is counted.

    Raises:
        ServeError: A prompt alone does not decide for one expert in this run.
    """

    def __init__(
        self,
        model: DyLoraModel,
        tokenizer: PreTrainedTokenizerBase,
        address: Address,
        *,
        base_name: str,
        metrics: Metrics,
    ) -> None:
        check_routable(model)
        self._model, self._tokenizer, self._address, self._metrics = model, tokenizer, address, metrics
        self._base_name, self._routing = base_name, threading.Lock()
        self._http: aiohttp.ClientSession | None = None
        self._context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0) or None
        self._is_closing = False

    async def answer(self, body: Body, speaker: Speaker, http: HttpRequest) -> Response:
        """See `Backend`. The header `X-DyLoRA-Model` tells whom the other server was asked for."""
        began = time.monotonic()
        model = speaker.expert or self._base_name
        if speaker.kind == "routed":
            model = await run_in_threadpool(self._route, body)
        sent = json.loads(await http.body()) | {"model": model}
        sent.pop("routing", None)
        told = body.stream_options is not None and body.stream_options.include_usage
        if body.stream:  # to count the tokens
            sent["stream_options"] = (sent.get("stream_options") or {}) | {"include_usage": True}
        path = "chat/completions" if isinstance(body, ChatRequest) else "completions"
        if self._http is None:
            self._http = self._address.session()
        try:
            response = await while_there(http.receive, self._ask(self._http, path, sent))
        except Gone:
            return Response(status_code=LEFT)
        headers = {"X-DyLoRA-Model": model}
        if body.stream and response.status == 200:
            passing = Passing(keeps_usage=told)

            def end() -> None:
                response.close()
                self._count(body.model, model, passing.tokens, began)

            return EventStream(self._passed(response, http, passing, body.model, began), at_end=end, headers=headers)
        try:
            content = await while_there(http.receive, self._whole(response))
        except Gone:
            return Response(status_code=LEFT)
        finally:
            response.close()
        if response.status != 200:
            raise _told(response.status, content, response.headers)
        self._count(body.model, model, _tokens_in(content), began)
        return Response(content, media_type="application/json", headers=headers)

    def is_alive(self) -> bool:
        """See `Backend`."""
        return True

    async def close(self, grace_s: float) -> None:
        """See `Backend`."""
        self._is_closing = True
        if self._http is not None:
            await self._http.close()

    def _count(self, asked: str, served: str, tokens: tuple[int, int] | None, began: float) -> None:
        read, written = tokens or (0, 0)
        self._metrics.tokens.labels(asked, "in").inc(read)
        self._metrics.tokens.labels(asked, "out").inc(written)
        if served != self._base_name:
            self._metrics.served({served: written})
        self._metrics.seconds.labels(asked).observe(time.monotonic() - began)

    def _route(self, body: Body) -> str:
        if isinstance(body, ChatRequest):
            prompts, special = [render_chat(body, self._tokenizer)], False
        else:
            prompts, special = body.prompts, True
        with self._routing:
            ids = [
                prompt if isinstance(prompt, list) else self._tokenizer(prompt, add_special_tokens=special)["input_ids"]
                for prompt in prompts
            ]
            vocabulary = self._model.lm.get_input_embeddings().weight.shape[0]  # type: ignore[index]
            if not all(row and all(0 <= token < vocabulary for token in row) for row in ids):
                raise ApiError(400, f"a prompt must have at least one token, each from 0 to {vocabulary - 1}.")
            longest = max(map(len, ids))
            if self._context is not None and longest > self._context:
                raise ApiError(
                    400,
                    f"a prompt must fit into the context of {self._context} tokens, got {longest}. Shorten it.",
                    code="context_length_exceeded",
                )
            try:
                chosen = {route(self._model, row) or self._base_name for row in ids}
            except ServeError as error:
                raise ApiError(422, str(error)) from error
        if len(chosen) > 1:
            raise ApiError(400, "prompts of one request must go to one expert here. Send them one by one.")
        return chosen.pop()

    async def _ask(self, http: aiohttp.ClientSession, path: str, sent: Mapping[str, Any]) -> aiohttp.ClientResponse:
        try:
            return await http.post(self._address.path(path), json=sent, allow_redirects=False)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise self._unreachable(error) from error

    async def _whole(self, response: aiohttp.ClientResponse) -> bytes:
        parts, size = [], 0
        try:
            async for part in response.content.iter_chunked(_PART):
                parts.append(part)
                size += len(part)
                if size > _MOST_BYTES:
                    raise ApiError(502, "the upstream's answer is too large.", kind="server_error")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise self._unreachable(error) from error
        return b"".join(parts)

    async def _passed(
        self, response: aiohttp.ClientResponse, http: HttpRequest, passing: Passing, model: str, began: float
    ) -> AsyncGenerator[bytes, None]:
        has_first = False
        try:
            async for part in response.content.iter_any():
                if not has_first:
                    has_first = True
                    self._metrics.first.labels(model).observe(time.monotonic() - began)
                for whole in passing.add(part):
                    yield whole
            yield passing.rest()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            failure = self._unreachable(error)
            http.state.status = failure.status
            yield passing.rest() + b"\n\n" + event(failure.body)
        except (GeneratorExit, asyncio.CancelledError):
            http.state.status = LEFT
            raise

    def _unreachable(self, error: Exception) -> ApiError:
        if self._is_closing:
            return explained(
                Closed("the server is closing, and this answer was not complete in time. Ask again later.")
            )
        if isinstance(error, asyncio.TimeoutError):
            return ApiError(504, "the upstream did not answer in time.", kind="timeout_error", code="upstream_timeout")
        return ApiError(
            502,
            f"the upstream cannot be reached, or left: {type(error).__name__}.",
            kind="server_error",
            code="upstream_unreachable",
        )


def _tokens_in(content: bytes) -> tuple[int, int] | None:
    try:
        return tokens_of(json.loads(content))
    except ValueError:
        return None


def _told(status: int, content: bytes, headers: Mapping[str, str]) -> ApiError:
    """The upstream's error, in its own words where it has OpenAI's shape."""
    if status in (401, 403) or not 400 <= status < 600:
        # Of our key and our address, not of the client's.
        return ApiError(502, f"the upstream refuses this server with HTTP {status}.", kind="server_error")
    try:
        given = json.loads(content)["error"]
        said, kind, code = str(given["message"])[:1000], str(given.get("type") or "server_error"), given.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        said, kind, code = f"the upstream answered with HTTP {status}.", "server_error", None
    wait = headers.get("Retry-After", "")
    return ApiError(
        status,
        said,
        kind=kind,
        code=None if code is None else str(code),
        retry_after_s=int(wait) if wait.isdigit() and len(wait) < 6 else None,
    )
