"""Pieces of answers -> OpenAI's objects: whole answers, and chunks of a stream."""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dylora_moe.serve.request import Piece, Stream

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How one request's answers are written.

    Attributes:
        is_chat: Of `/v1/chat/completions`, else of `/v1/completions`.
        model: As it was asked for.
        fingerprint: Of the weights.
        decode: Token id -> its text.
        number: Answers to each prompt.
        likeliest: How many of the likeliest tokens to tell; None for no log probabilities.
        routing: Whether to tell who served each token.
    """

    is_chat: bool
    model: str
    fingerprint: str
    decode: Callable[[int], str]
    number: int
    likeliest: int | None
    routing: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _told: dict[int, int] = field(default_factory=dict)
    """Characters of each answer that went out in chunks."""

    def whole(self, answers: Sequence[Sequence[Piece]], streams: Sequence[Stream]) -> dict[str, Any]:
        """All answers, each with all its pieces."""
        choices = [self._choice(index, pieces, "message") for index, pieces in enumerate(answers)]
        return self._object("chat.completion" if self.is_chat else "text_completion", choices) | {
            "usage": self._usage(streams)
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream of chat begins with."""
        if not self.is_chat:
            return None
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """One piece; None where it has nothing to show."""
        if not (piece.text or piece.finish or (piece.token_id is not None and (self.routing or self._tells_logs))):
            return None
        choice = self._choice(index, [piece], "delta")
        self._told[index] = self._told.get(index, 0) + len(piece.text)
        return self._chunk([choice])

    def closing(self, streams: Sequence[Stream]) -> dict[str, Any]:
        """What a stream ends with where usage was asked for."""
        return self._chunk([]) | {"usage": self._usage(streams)}

    @property
    def _tells_logs(self) -> bool:
        return self.likeliest is not None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object("chat.completion.chunk" if self.is_chat else "text_completion", choices)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _choice(self, index: int, pieces: Sequence[Piece], part: str) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [piece for piece in pieces if piece.token_id is not None]
        if not self.is_chat:
            content: dict[str, Any] = {"text": text}
        elif part == "message":
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            content = {"delta": {"content": text} if text else {}}
        logs = None
        if self._tells_logs and (tokens or part == "message"):
            logs = self._chat_logs(tokens) if self.is_chat else self._text_logs(tokens, self._told.get(index, 0))
        choice = {"index": index, **content, "logprobs": logs, "finish_reason": pieces[-1].finish if pieces else None}
        if self.routing:
            choice["routing"] = [{"token": piece.text, "experts": piece.experts or {}} for piece in tokens]
        return choice

    def _usage(self, streams: Sequence[Stream]) -> dict[str, int]:
        """Tokens of each prompt once, as OpenAI counts them, though it is read for each of its answers."""
        read = sum(stream.prompt_tokens for stream in streams[:: self.number])
        written = sum(stream.completion_tokens for stream in streams)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _chat_logs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = []
        for piece in pieces:
            assert piece.token_id is not None
            likeliest = [self._token(token, log) for token, log in piece.top_logprobs or ()]
            content.append(self._token(piece.token_id, piece.logprob or 0.0) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, log: float) -> dict[str, Any]:
        text = self.decode(token_id)
        # Of half a character nobody knows the bytes from its text.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(log, -9999.0), "bytes": data}

    def _text_logs(self, pieces: Sequence[Piece], at: int) -> dict[str, Any]:
        offsets = []
        for piece in pieces:
            offsets.append(at)
            at += len(piece.text)
        return {
            "tokens": [self.decode(piece.token_id) for piece in pieces if piece.token_id is not None],
            "token_logprobs": [max(piece.logprob or 0.0, -9999.0) for piece in pieces],
            "top_logprobs": [
                # The token itself is among them, as OpenAI has it, also where it was not likely.
                {self.decode(token): max(log, -9999.0) for token, log in (*(piece.top_logprobs or ()), own)}
                for piece in pieces
                for own in [(piece.token_id or 0, piece.logprob or 0.0)]
            ],
            "text_offset": offsets,
        }


def event(data: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
