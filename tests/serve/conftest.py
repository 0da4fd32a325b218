"""Tiny mixtures with a tokenizer of their own, an engine over each, and the same model asked alone."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import OpenAI
from tests.tiny import lean_process, tiny_base
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dylora_moe.data.templates import ensure_template
from dylora_moe.evaluate.load import Speaker
from dylora_moe.serve.app import Answers, make_app
from dylora_moe.serve.engine import Engine, Limits
from dylora_moe.serve.local import Local
from dylora_moe.serve.metrics import Metrics
from dylora_moe.serve.names import name_speakers
from dylora_moe.serve.request import Piece, Request
from dylora_moe.serve.server import listen, make_server
from dylora_moe.tuner import DyLoraModel

__all__ = ["lean_process", "tiny_base"]

ROUTED, BASE = Speaker(), Speaker(kind="base")
END = 1


def expert(number: int) -> Speaker:
    return Speaker(kind="expert", expert=f"expert_{number}")


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="session")
def make_mixture(make_model: Callable[..., Any], make_base: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """(architecture, **routing) -> a mixture of four over a tiny base with the tokenizer's vocabulary."""

    def make(architecture: str = "llama", **routing: Any) -> DyLoraModel:
        model = make_model(4, architecture, base=make_base(architecture, vocab_size=len(tokenizer)), **routing)
        if routing.get("router") == "prototype":
            draw = np.random.default_rng(3)
            model.set_prototypes(np.eye(32, 4), draw.normal(size=(4, 4)), np.full(4, 1.3), model.expert_names)
        return model

    return make


@pytest.fixture
def make_engine(tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., Engine]]:
    """(model, **limits) -> an engine that is closed after the test."""
    engines: list[Engine] = []

    def make(model: DyLoraModel, **limits: Any) -> Engine:
        engines.append(Engine(model, tokenizer, Limits(**limits)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(drain=False)


class Gate:
    """Holds a model's passes until they are allowed, so that a test says what has happened so far."""

    def __init__(self, model: DyLoraModel) -> None:
        self._allowed, self._is_open = threading.Semaphore(0), threading.Event()
        self._hook = model.register_forward_pre_hook(lambda *_: self._wait())

    def allow(self, passes: int) -> None:
        self._allowed.release(passes)

    def open(self) -> None:
        self._hook.remove()
        self._is_open.set()
        self._allowed.release()

    def _wait(self) -> None:
        if not self._is_open.is_set() and not self._allowed.acquire(timeout=60):
            raise AssertionError("the passes that the test allowed must be enough")


@pytest.fixture
def make_gate(make_engine: Callable[..., Engine]) -> Iterator[Callable[[DyLoraModel], Gate]]:
    """(model) -> its gate, which is opened after the test and before its engines are closed."""
    gates: list[Gate] = []

    def make(model: DyLoraModel) -> Gate:
        gates.append(Gate(model))
        return gates[-1]

    yield make
    for gate in gates:
        gate.open()


def speaking(model: DyLoraModel, speaker: Speaker) -> AbstractContextManager[None]:
    if speaker.kind == "base":
        return model.disabled()
    return model.forced(speaker.expert) if speaker.expert is not None else nullcontext()


@torch.no_grad()
def assert_alone(model: DyLoraModel, request: Request, pieces: Sequence[Piece]) -> None:
    """Each token is the likeliest after those before it, read without a cache and without other rows."""
    assert not isinstance(request.prompt, str)
    tokens = tokens_of(pieces)
    ended = [] if len(tokens) == request.max_tokens else [None]
    ids = torch.tensor([[*request.prompt, *tokens]])
    prompt = torch.arange(ids.shape[1])[None] < len(request.prompt)
    with speaking(model, request.speaker):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_mask=prompt, use_cache=False).logits
    likeliest = logits[0, len(request.prompt) - 1 :].argmax(-1).tolist()
    expected = likeliest[: len(tokens) + len(ended)]
    ends = set(request.end_token_ids)
    assert [None if token in ends else token for token in expected] == tokens + ended
    assert pieces[-1].finish == ("stop" if ended else "length")
    assert all(piece.finish is None for piece in pieces[:-1])


def generated(model: DyLoraModel, request: Request) -> list[int]:
    """What transformers' own `generate` writes."""
    ids = torch.tensor([list(request.prompt)])
    how = {"max_new_tokens": request.max_tokens, "do_sample": False, "eos_token_id": [10**6], "pad_token_id": 0}
    with speaking(model, request.speaker):
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    return written[0, ids.shape[1] :].tolist()


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    return [piece.token_id for piece in pieces if piece.token_id is not None]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server on a free port of this process."""

    url: str
    engine: Engine
    answers: Answers
    server: Any

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "unused", "max_retries": 0, "timeout": 60} | options)


@pytest.fixture
def start_server(make_engine: Callable[..., Engine], tokenizer: Any) -> Iterator[Callable[..., Served]]:
    """(model, key, backend, most_tokens, timeout_s, grace_s, **limits) -> a server that ends after the test."""
    running: list[tuple[Served, threading.Thread]] = []
    ensure_template(tokenizer)

    def start(
        model: Any,
        *,
        key: str | None = None,
        backend: Any = None,
        most_tokens: int = 200,
        timeout_s: float = 60.0,
        grace_s: float = 5.0,
        **limits: Any,
    ) -> Served:
        engine = make_engine(model, **limits)
        metrics = Metrics(engine.snapshot)
        local = Local(
            engine=engine,
            end_token_ids=(),
            fingerprint="dylora-test",
            most_tokens=most_tokens,
            timeout_s=timeout_s,
            metrics=metrics,
        )
        answers = Answers(backend or local, name_speakers("tiny", model.expert_names), metrics)
        listening, ready = listen("127.0.0.1", 0), threading.Event()
        app = make_app(answers, key=key, only_local=True, most_bytes=100_000)
        server = make_server(app, answers, grace_s=grace_s, ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(30)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.append((Served(url=url, engine=engine, answers=answers, server=server), thread))
        return running[-1][0]

    yield start
    for served, thread in running:
        served.server.handle_exit(15, None)
        served.server.handle_exit(15, None)
        thread.join(20)
        assert not thread.is_alive(), "the server must end"
