"""Faults of the engine outside a pass: nobody waits for ever, nobody else is harmed, and it goes on where it can."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import requests
from tests.serve.conftest import BASE, ROUTED, Gate, Served, expert, tokens_of

from dylora_moe.serve.engine import Engine
from dylora_moe.serve.request import Broken, Closed, Piece, Request, Stream
from dylora_moe.serve.text import StopStrings

ASK: Any = [{"role": "user", "content": "Say blue river in capitals."}]
WORDS: Any = {"model": "tiny", "messages": ASK, "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def model(make_mixture: Callable[..., Any]) -> Any:
    return make_mixture("llama", granularity="sequence")


def ask(prompt: int = 5, **changes: Any) -> Request:
    return Request(**{"prompt": [prompt, 6, 7], "speaker": ROUTED, "max_tokens": 12} | changes)


def end(stream: Stream) -> Any:
    """How it ends, told by a reader that is not waited for for ever."""
    found: list[Any] = []

    def read() -> None:
        try:
            found.append(list(stream)[-1].finish)
        except Exception as error:
            found.append(type(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(30)
    return found[0] if found else "waits for ever"


def test_a_fault_between_passes_is_told_to_all_and_the_next_are_answered(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate, sort_out = make_engine(model, rows=2), make_gate(model), Engine._sort_out
    streams = [engine.submit(ask(number)) for number in range(5, 11)]  # two at most have a row, the others wait

    def fail(self: Engine) -> Any:
        monkeypatch.setattr(Engine, "_sort_out", sort_out)
        raise RuntimeError("secret")

    monkeypatch.setattr(Engine, "_sort_out", fail)
    gate.open()
    assert [end(stream) for stream in streams] == [Broken] * 6
    assert engine.is_alive and engine.snapshot().rows == engine.snapshot().waiting == 0
    assert end(engine.submit(ask())) == "length"


def test_who_is_being_taken_when_that_fails_is_told_too(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate, fits = make_engine(model), make_gate(model), Engine._fits
    first = engine.submit(ask())
    gate.allow(1)
    next(iter(first))  # it has its row
    others = [engine.submit(ask(number)) for number in (6, 7, 8)]

    def fail(self: Engine, running: Any, taken: Any, job: Any) -> bool:
        if len(taken) == 2:
            monkeypatch.setattr(Engine, "_fits", fits)
            raise RuntimeError("secret")
        return fits(self, running, taken, job)

    monkeypatch.setattr(Engine, "_fits", fail)
    gate.open()
    assert {end(stream) for stream in (first, *others)} == {Broken}
    assert end(engine.submit(ask())) == "length"


def test_a_row_whose_text_fails_ends_alone(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    alone = [list(engine.submit(ask(speaker=speaker))) for speaker in (BASE, expert(1), expert(2))]
    gate = make_gate(model)
    streams = [engine.submit(ask(speaker=speaker)) for speaker in (BASE, expert(1), expert(2))]
    wrong, stop = streams[1], "never in it"
    hurt = engine.submit(ask(stop=(stop,)))
    add = StopStrings.add

    def fail(self: Any, token: Any, text: str) -> Any:
        if self._strings == [stop]:
            raise RuntimeError("secret")
        return add(self, token, text)

    monkeypatch.setattr(StopStrings, "add", fail)
    gate.open()
    assert end(hurt) is Broken
    found: list[list[Piece]] = [list(stream) for stream in streams]
    assert [tokens_of(pieces) for pieces in found] == [tokens_of(pieces) for pieces in alone]
    assert wrong.completion_tokens == 12 and end(engine.submit(ask())) == "length"


def test_an_engine_that_ended_says_so(
    model: Any, start_server: Callable[..., Served], make_gate: Callable[[Any], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start_server(model)
    assert requests.get(f"{served.url}/health", timeout=20).json() == {"status": "ok"}
    gate = make_gate(model)
    streams = [served.engine.submit(ask(number)) for number in range(5, 9)]

    def leave(*args: Any) -> Any:
        raise SystemExit(3)

    monkeypatch.setattr("dylora_moe.serve.engine.choose", leave)
    gate.open()
    assert {end(stream) for stream in streams} == {Broken}
    with pytest.raises(Closed):
        served.engine.submit(ask())
    for path in ("/health", "/ready"):
        answer = requests.get(served.url + path, timeout=20)
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
    assert requests.post(f"{served.url}/v1/chat/completions", json=WORDS, timeout=20).status_code == 503


def test_a_stream_that_cannot_be_written_tells_so(
    model: Any, start_server: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = start_server(model)

    def fail(*args: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr("dylora_moe.serve.shapes.Shape.chunk", fail)
    answer = requests.post(f"{served.url}/v1/chat/completions", json=WORDS | {"stream": True}, timeout=20)
    assert '"type":"server_error"' in answer.text and "secret" not in answer.text
    assert "secret" in caplog.text
    text = requests.get(f"{served.url}/metrics", timeout=20).text
    assert 'model="tiny",status="500"} 1.0' in text
