"""Answers by the engine of this process: a request's body in, a response out."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dylora_moe.data.templates import render_prompt
from dylora_moe.errors import ServeError
from dylora_moe.evaluate.load import Speaker
from dylora_moe.serve.engine import Engine
from dylora_moe.serve.leaving import EventStream, Gone, while_there
from dylora_moe.serve.metrics import Metrics
from dylora_moe.serve.request import Closed, Full, Piece, Request, Stream, TimedOut, TooLong
from dylora_moe.serve.schema import FAILED, ApiError, Body, ChatRequest
from dylora_moe.serve.shapes import DONE, Shape, event

logger = logging.getLogger(__name__)

LEFT = 499
"""How a client that left is counted; it gets no answer."""


class Backend(Protocol):
    """Who answers requests, here or elsewhere."""

    async def answer(self, body: Body, speaker: Speaker, http: HttpRequest) -> Response:
        """The answer.

        Raises:
            ApiError: There is none.
        """
        ...

    def is_alive(self) -> bool:
        """Whether it can answer at all."""
        ...

    async def close(self, grace_s: float) -> None:
        """Let go of what it holds; answers under way have so many seconds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Answers by the engine.

    Attributes:
        engine: That answers.
        end_token_ids: Of the run's template.
        fingerprint: Of the weights.
        most_tokens: Longest answer.
        timeout_s: Longest time for one.
        metrics: What is counted.
    """

    engine: Engine
    end_token_ids: Sequence[int]
    fingerprint: str
    most_tokens: int
    timeout_s: float
    metrics: Metrics

    async def answer(self, body: Body, speaker: Speaker, http: HttpRequest) -> Response:
        """See `Backend`."""
        began = time.monotonic()
        client = http.client.host if http.client else ""
        streams = await run_in_threadpool(self._submit, body, speaker, client)
        shape = Shape(
            is_chat=isinstance(body, ChatRequest),
            model=body.model,
            fingerprint=self.fingerprint,
            decode=lambda token: str(self.engine.tokenizer.decode([token])),
            number=body.n or 1,
            likeliest=body.likeliest,
            routing=body.routing,
        )
        reading = _Reading(self, body.model, streams, began)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(self._events(shape, reading, http, with_usage=with_usage), at_end=reading.end)
        try:
            return JSONResponse(shape.whole(await while_there(http.receive, reading.all()), streams))
        except Gone:
            return Response(status_code=LEFT)
        except ServeError as error:
            raise explained(error) from error
        finally:
            reading.end()

    def is_alive(self) -> bool:
        """See `Backend`."""
        return self.engine.is_alive

    async def close(self, grace_s: float) -> None:
        """See `Backend`."""
        await run_in_threadpool(lambda: self.engine.close(grace_s=grace_s))

    def _submit(self, body: Body, speaker: Speaker, client: str) -> list[Stream]:
        prompts, most = self._prompts(body), self.most_tokens
        if (body.longest or 0) > most:
            raise ApiError(400, f"max_tokens must be at most {most}, got {body.longest}.", param="max_tokens")
        streams: list[Stream] = []
        try:
            for prompt in prompts:
                room = min(most, self.engine.most_tokens - len(prompt))
                for number in range(body.n or 1):
                    request = Request(
                        prompt=prompt,
                        speaker=speaker,
                        max_tokens=body.longest or max(room, 1),
                        temperature=1.0 if body.temperature is None else body.temperature,
                        top_p=max(1.0 if body.top_p is None else body.top_p, 1e-9),
                        seed=None if body.seed is None else body.seed + number,
                        stop=body.stops,
                        end_token_ids=self.end_token_ids,
                        logprobs=body.likeliest,
                        client=client,
                        timeout_s=self.timeout_s,
                    )
                    streams.append(self.engine.submit(request))
        except ServeError as error:
            for stream in streams:
                stream.cancel()
            raise explained(error) from error
        return streams

    def _prompts(self, body: Body) -> list[list[int]]:
        if isinstance(body, ChatRequest):
            return [self.engine.encode(render_chat(body, self.engine.tokenizer), add_special_tokens=False)]
        return [
            self.engine.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]

    async def _events(
        self, shape: Shape, reading: "_Reading", http: HttpRequest, *, with_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        told = {"usage": None} if with_usage else {}
        try:
            for index in range(len(reading.streams)):
                if (opening := shape.opening(index)) is not None:
                    yield event(opening | told)
            async for index, piece in reading.merged():
                if (chunk := shape.chunk(index, piece)) is not None:
                    yield event(chunk | told)
            if with_usage:
                yield event(shape.closing(reading.streams))
            yield DONE
        except (GeneratorExit, asyncio.CancelledError):
            http.state.status = LEFT
            raise
        except Exception as error:  # of whatever kind: a stream that breaks off tells nothing
            if not isinstance(error, ServeError):
                logger.exception("a stream failed")
            failure = explained(error) if isinstance(error, ServeError) else ApiError(500, FAILED, kind="server_error")
            http.state.status = failure.status
            yield event(failure.body)


class _Reading:
    """The answers to one request while they come; what is counted of them."""

    def __init__(self, local: Local, model: str, streams: Sequence[Stream], began: float) -> None:
        self._local, self._model, self.streams, self._began, self._has_first = local, model, streams, began, False

    async def merged(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all answers as they come, each with the number of its answer."""
        arrived: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

        async def read(index: int, stream: Stream) -> None:
            try:
                async for piece in stream:
                    arrived.put_nowait((index, piece))
            except BaseException as error:
                arrived.put_nowait(error)

        tasks = [asyncio.ensure_future(read(index, stream)) for index, stream in enumerate(self.streams)]
        try:
            left = len(tasks)
            while left:
                found = await arrived.get()
                if isinstance(found, BaseException):
                    raise found
                self._count(found[1])
                yield found
                left -= found[1].finish is not None
        finally:
            for task in tasks:
                task.cancel()

    async def all(self) -> list[list[Piece]]:
        """All answers, complete."""
        answers: list[list[Piece]] = [[] for _ in self.streams]
        async for index, piece in self.merged():
            answers[index].append(piece)
        return answers

    def end(self) -> None:
        """Let go of answers that are not complete, and count."""
        metrics = self._local.metrics
        for stream in self.streams:
            stream.cancel()
            metrics.tokens.labels(self._model, "in").inc(stream.prompt_tokens)
            metrics.tokens.labels(self._model, "out").inc(stream.completion_tokens)
        metrics.seconds.labels(self._model).observe(time.monotonic() - self._began)

    def _count(self, piece: Piece) -> None:
        if piece.finish == "cancelled":
            raise Closed("the server is closing, and this answer was not complete in time. Ask again later.")
        metrics = self._local.metrics
        if not self._has_first:
            self._has_first = True
            metrics.first.labels(self._model).observe(time.monotonic() - self._began)
        metrics.served(piece.experts)


def render_chat(body: ChatRequest, tokenizer: Any) -> str:
    """The prompt as the run's template writes it.

    Raises:
        ApiError: The template refuses the messages.
    """
    try:
        return render_prompt([turn.message() for turn in body.messages], tokenizer)
    except Exception as error:  # templates raise jinja2's errors, or Python's own from their expressions
        raise ApiError(
            400, f"messages must be such as the model's template takes: {error}."[:400], param="messages"
        ) from error


def explained(error: ServeError) -> ApiError:
    """The engine's errors as OpenAI's."""
    said = str(error)
    kinds: list[tuple[type[ServeError], Callable[[], ApiError]]] = [
        (Full, lambda: ApiError(429, said, kind="rate_limit_error", code="queue_full", retry_after_s=1)),
        (TooLong, lambda: ApiError(400, said, code="context_length_exceeded")),
        (TimedOut, lambda: ApiError(504, said, kind="timeout_error", code="timeout")),
        (Closed, lambda: ApiError(503, said, kind="server_error", code="closing", retry_after_s=5)),
    ]
    made = (make() for kind, make in kinds if isinstance(error, kind))
    return next(made, None) or ApiError(500, said, kind="server_error")
