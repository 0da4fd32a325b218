"""What a client may send and how it is told of errors, in OpenAI's shapes.

Fields that OpenAI knows and that change nothing here are taken and left aside; those that would change the answer are
refused where they ask for something that this server cannot do; all others are unknown, and refused as OpenAI does.
"""

import re
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dylora_moe.data.example import Message

MOST_CHOICES, MOST_LOGPROBS = 16, 20
FAILED = "the server failed; its log says why."
_KIND = re.compile(r"constrained-str|list\[.*\]")
Text = Annotated[str, Field(max_length=2_000_000)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]


class ApiError(Exception):
    """An answer that is an error; `kind` and `code` are OpenAI's words where it has some."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """As it is sent."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def closing() -> ApiError:
    """To requests that come while the server ends."""
    said = "the server is closing. Ask again later."
    return ApiError(503, said, kind="server_error", code="closing", retry_after_s=5)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message's content; only text can be read."""

    type: Literal["text"]
    text: Text


class Turn(_Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1000)]
    name: str | None = None
    """Left aside."""
    # What an answer of OpenAI's has, empty here, and its client sends back with it.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def message(self) -> Message:
        """As a template takes it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return Message(role="system" if self.role == "developer" else self.role, content="".join(parts))


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Left aside."""


class ResponseFormat(_Strict):
    """The only format that there is."""

    type: Literal["text"]


class _Common(_Strict):
    model: Annotated[str, Field(min_length=1, max_length=300)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    routing: bool = False
    """An extension: tell with each choice which experts served each token."""
    # Left aside.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Only as they change nothing.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Common):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=2000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _likeliest_need_logprobs(self) -> Any:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def longest(self) -> int | None:
        """Of the answer, as asked for."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to tell; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Common):
    """The body of `/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[int], Field(min_length=1, max_length=1_000_000)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def longest(self) -> int | None:
        """Of the answer, as asked for; 16 where not, as OpenAI has it."""
        return self.max_tokens if self.max_tokens is not None else 16

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to tell; None for no log probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        given: Any = self.prompt
        alone = isinstance(given, str) or isinstance(given[0], int)
        return [given] if alone else list(given)


Body = ChatRequest | CompletionRequest


def explain(errors: list[Any]) -> ApiError:
    """What pydantic found wrong -> the first of it, in OpenAI's shape; nothing of what was sent is repeated."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, "the body must be JSON, and it is not. Look at its commas, quotes and brackets.")
    # Of the kinds that a field may have, the one that fitted furthest was meant.
    tried = (error for error in errors if error["loc"][:2] == errors[0]["loc"][:2])
    first = max(tried, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    is_unknown = first["type"] == "extra_forbidden"
    named = [str(part) for part in first["loc"] if part != "body"]
    # Those kinds stand among the names of fields.
    end = len(named) - is_unknown
    place = [part for at, part in enumerate(named) if at == end or not _KIND.fullmatch(part)]
    param = ".".join(place)[:100] or None
    if is_unknown:
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param)
    return ApiError(400, f"{param or 'the body'}: {first['msg']}."[:400], param=param)
