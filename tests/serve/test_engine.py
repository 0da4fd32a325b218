"""The engine: every answer is the one that its request gets alone, whatever else runs; within its limits."""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from tests.serve.conftest import BASE, END, ROUTED, Gate, assert_alone, expert, generated, text_of, tokens_of

from dylora_moe.errors import ServeError, TunerError
from dylora_moe.evaluate.load import Speaker
from dylora_moe.serve.engine import Engine
from dylora_moe.serve.request import Broken, Closed, Full, Piece, Request, Stream, TimedOut, TooLong

MIXTURES = {
    "llama, token": ("llama", {"granularity": "token"}),
    "llama, token, two of four": ("llama", {"granularity": "token", "top_k": 2}),
    "llama, document, two of four": ("llama", {"granularity": "sequence", "top_k": 2}),
    "llama, prototypes": ("llama", {"granularity": "sequence", "router": "prototype"}),
    "llama, prototypes, all when unsure": (
        "llama",
        {"granularity": "sequence", "router": "prototype", "unsure": "dense"},
    ),
    "gemma, token": ("gemma3", {"granularity": "token"}),
    "gemma, document": ("gemma3", {"granularity": "sequence"}),
    "gemma, prototypes": ("gemma3", {"granularity": "sequence", "router": "prototype"}),
}
SPEAKERS = (ROUTED, BASE, ROUTED, expert(0), ROUTED, expert(3))


def crowd(number: int, seed: int = 0, **changes: Any) -> list[Request]:
    """Requests of different speakers, prompts and lengths."""
    draw = random.Random(seed)
    return [
        Request(
            prompt=[draw.randrange(3, 300) for _ in range(draw.choice((1, 3, 9, 20, 60)))],
            speaker=SPEAKERS[index % len(SPEAKERS)],
            max_tokens=draw.choice((1, 2, 7, 15, 40)),
            end_token_ids=(END, 30, 31),
            **changes,
        )
        for index in range(number)
    ]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_answer_is_the_one_that_is_given_alone(
    make_mixture: Callable[..., Any], make_engine: Callable[..., Engine], mixture: str
) -> None:
    architecture, routing = MIXTURES[mixture]
    model = make_mixture(architecture, **routing)
    requests = crowd(40)
    engine = make_engine(model, rows=12, prefill_tokens=200, tokens=1200)
    streams = []
    for index, request in enumerate(requests):
        streams.append(engine.submit(request))
        time.sleep(0.02 * (index % 4 == 3))
    found = [list(stream) for stream in streams]
    engine.close()
    for request, stream, pieces in zip(requests, streams, found, strict=True):
        assert_alone(model, request, pieces)
        assert stream.prompt_tokens == len(request.prompt)
        assert stream.completion_tokens == len(tokens_of(pieces)) + (pieces[-1].finish == "stop")
    assert len({tuple(tokens_of(pieces)) for pieces in found}) > 25, "answers that are all alike show nothing"
    assert {"stop", "length"} == {pieces[-1].finish for pieces in found}


@pytest.mark.parametrize("mixture", ["llama, token", "gemma, document"])
def test_an_answer_is_that_of_generate(
    make_mixture: Callable[..., Any], make_engine: Callable[..., Engine], mixture: str
) -> None:
    architecture, routing = MIXTURES[mixture]
    model = make_mixture(architecture, **routing)
    requests = [replace(request, end_token_ids=(), max_tokens=8) for request in crowd(4)]
    engine = make_engine(model)
    found = [list(engine.submit(request)) for request in requests]
    engine.close()
    assert [tokens_of(pieces) for pieces in found] == [generated(model, request) for request in requests]
    assert [text_of(pieces) for pieces in found] == [
        engine.tokenizer.decode(tokens_of(pieces), skip_special_tokens=True) for pieces in found
    ]


@pytest.fixture(scope="module")
def model(make_mixture: Callable[..., Any]) -> Any:
    return make_mixture("llama", granularity="token")


def ask(number: int = 0, **changes: Any) -> Request:
    """A request of one crowd that ends by its length alone."""
    return replace(crowd(12)[number], **{"end_token_ids": (), "max_tokens": 12} | changes)


def test_a_short_answer_does_not_wait_for_a_long_one(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate]
) -> None:
    engine, gate = make_engine(model), make_gate(model)
    long = engine.submit(ask(max_tokens=120))
    gate.allow(20)
    first = next(iter(long))
    waiting = engine.submit(ask(1, max_tokens=4))
    gate.allow(10)
    short = list(waiting)
    assert long.completion_tokens <= 30 and first.finish is None and short[-1].finish == "length"
    gate.open()
    assert len(list(long)) == 119


def test_a_seed_draws_the_same_answer_whatever_else_runs(model: Any, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(model)
    wanted = ask(4, temperature=1.2, top_p=0.9, seed=17)
    quiet = tokens_of(list(engine.submit(wanted)))
    others = [engine.submit(ask(index, temperature=0.7)) for index in range(8)]
    assert tokens_of(list(engine.submit(wanted))) == quiet
    assert [stream.completion_tokens for stream in others if list(stream)] == [12] * 8
    drawn = [tokens_of(list(engine.submit(replace(wanted, seed=seed)))) for seed in (18, 19, None, None)]
    assert len({tuple(tokens) for tokens in [quiet, *drawn]}) == 5
    assert tokens_of(list(engine.submit(replace(wanted, temperature=1e-6)))) == tokens_of(
        list(engine.submit(replace(wanted, temperature=0.0)))
    )


def test_an_answer_ends_before_a_stop_string(model: Any, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(model)
    whole = list(engine.submit(ask(6, max_tokens=30)))
    text = text_of(whole)
    for start in range(2, 20, 3):
        stop = text[start : start + 4]
        found = list(engine.submit(ask(6, max_tokens=30, stop=("never in it", stop))))
        assert text_of(found) == text[: text.index(stop)] and found[-1].finish == "stop"
        assert len(found) < len(whole)


def test_experts_are_those_of_the_pass_that_wrote_the_token(
    make_mixture: Callable[..., Any], make_engine: Callable[..., Engine]
) -> None:
    model = make_mixture("llama", granularity="token", top_k=2)
    engine = make_engine(model)
    routed, forced, base = (list(engine.submit(ask(0, speaker=one))) for one in (ROUTED, expert(2), BASE))
    engine.close()
    assert [piece.experts for piece in forced] == [{"expert_2": 1.0}] * 12
    assert [piece.experts for piece in base] == [None] * 12
    ids = torch.tensor([[*ask(0).prompt, *tokens_of(routed)]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    gates = model.routing()
    assert gates is not None
    for piece, row in zip(routed, gates[0, len(ask(0).prompt) - 1 : -1], strict=True):
        assert piece.experts == pytest.approx(
            {name: float(gate) for name, gate in zip(model.expert_names, row, strict=True) if gate > 0}, abs=1e-4
        )
    assert len({tuple(piece.experts or ()) for piece in routed}) > 1


def test_log_probabilities_are_the_models(model: Any, make_engine: Callable[..., Engine]) -> None:
    request = ask(1, temperature=0.8, top_p=0.5, seed=3, logprobs=4)
    engine = make_engine(model)
    pieces = list(engine.submit(request))
    engine.close()
    ids = torch.tensor([[*request.prompt, *tokens_of(pieces)]])
    with torch.no_grad(), model.disabled():
        logs = model(input_ids=ids).logits[0, len(request.prompt) - 1 :].log_softmax(-1)
    for piece, row in zip(pieces, logs, strict=False):
        assert piece.logprob == pytest.approx(float(row[piece.token_id or 0]), abs=1e-4)
        assert piece.top_logprobs is not None and [token for token, _ in piece.top_logprobs] == row.topk(4)[1].tolist()
    assert all(piece.logprob is None for piece in make_engine(model).submit(ask()))


def test_who_leaves_makes_room(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate]
) -> None:
    engine, gate = make_engine(model, rows=2), make_gate(model)
    first, second = (engine.submit(ask(index, max_tokens=190)) for index in range(2))
    third, fourth = (engine.submit(ask(index, max_tokens=3)) for index in range(2))
    gate.allow(10)
    next(iter(second))
    assert engine.snapshot().waiting == 2
    fourth.cancel()
    gate.allow(1)
    assert [piece.finish for piece in fourth] == ["cancelled"]
    first.cancel()
    gate.allow(10)
    assert list(first)[-1].finish == "cancelled" and first.completion_tokens <= 20
    assert list(third)[-1].finish == "length" and second.completion_tokens <= 21
    second.cancel()
    gate.open()
    assert list(second)[-1].finish == "cancelled"


def test_a_full_queue_takes_no_more(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate]
) -> None:
    engine, gate = make_engine(model, rows=1, waiting=2), make_gate(model)
    streams = [engine.submit(ask(max_tokens=190))]
    gate.allow(2)
    next(iter(streams[0]))
    streams += [engine.submit(ask(max_tokens=2)) for _ in range(2)]
    with pytest.raises(Full, match="at most 2"):
        engine.submit(ask())
    streams[0].cancel()
    gate.open()
    assert [list(stream)[-1].finish for stream in streams] == ["cancelled", "length", "length"]
    assert list(engine.submit(ask()))[-1].finish == "length"


def test_an_answer_has_its_time_waiting_counted(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate]
) -> None:
    engine, gate = make_engine(model, rows=1), make_gate(model)
    slow = engine.submit(ask(max_tokens=190, timeout_s=0.2))
    waiting = engine.submit(ask(timeout_s=0.05))
    gate.allow(3)
    time.sleep(0.3)
    gate.open()
    with pytest.raises(TimedOut, match=r"within 0\.2 s, and \d+ tokens"):
        list(slow)
    with pytest.raises(TimedOut, match="0 tokens were written"):
        list(waiting)
    assert list(engine.submit(ask()))[-1].finish == "length"


def test_what_will_never_fit_is_refused(model: Any, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(model, tokens=200)
    with pytest.raises(TooLong, match="context of 256 tokens, got 250 and 7"):
        engine.submit(ask(prompt=[5] * 250, max_tokens=7))
    with pytest.raises(TooLong, match="at most 200 tokens here, got 150 and 51"):
        engine.submit(ask(prompt=[5] * 150, max_tokens=51))
    for prompt in ([], "", [320], [-1]):
        with pytest.raises(TooLong, match="at least one token, each from 0 to 319"):
            engine.submit(ask(prompt=prompt))
    with pytest.raises(TunerError, match="no expert 'nobody'"):
        engine.submit(ask(speaker=Speaker(kind="expert", expert="nobody")))
    for wrong in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"speaker": Speaker(kind="dense")}):
        with pytest.raises(ServeError, match=next(iter(wrong))):
            ask(**wrong)


def test_rows_and_tokens_stay_within_their_limits(model: Any, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(model, rows=5, tokens=300)
    streams = [engine.submit(replace(request, max_tokens=30)) for request in crowd(30)]
    most = [0, 0]
    while engine.snapshot().waiting or engine.snapshot().rows:
        now = engine.snapshot()
        most = [max(most[0], now.rows), max(most[1], now.tokens)]
        time.sleep(0.001)
    assert 2 <= most[0] <= 5 and 60 < most[1] <= 300
    assert all(list(stream)[-1].finish for stream in streams)


def test_one_client_does_not_keep_all_places(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate]
) -> None:
    engine, gate = make_engine(model, rows=4), make_gate(model)
    greedy = [engine.submit(ask(client="greedy", max_tokens=40)) for _ in range(12)]
    other = engine.submit(ask(client="other", max_tokens=5))
    gate.allow(60)
    assert list(other)[-1].finish == "length"
    assert sum(stream.completion_tokens == 40 for stream in greedy) <= 4
    gate.open()
    assert all(list(stream)[-1].finish == "length" for stream in greedy)


def test_a_pass_that_fails_ends_its_requests_and_no_others(
    model: Any,
    make_engine: Callable[..., Engine],
    make_gate: Callable[[Any], Gate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(model)
    whole, forward, wrong = list(engine.submit(ask())), model.lm.forward, threading.Event()

    def fail(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        if 299 in ids.tolist()[0] or (wrong.is_set() and ids.shape[1] == 1):
            raise RuntimeError("secret")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.lm, "forward", fail)
    running = engine.submit(ask(max_tokens=60))
    pieces = [next(iter(running))]
    with pytest.raises(Broken, match="log says why") as caught:
        list(engine.submit(ask(prompt=[299, 4])))
    assert "secret" not in str(caught.value)
    pieces += list(running)
    assert tokens_of(pieces)[:12] == tokens_of(whole) and len(pieces) == 60
    gate = make_gate(model)
    running = engine.submit(ask(max_tokens=200))
    gate.allow(3)
    next(iter(running))
    wrong.set()
    gate.open()
    with pytest.raises(Broken):
        list(running)
    wrong.clear()
    assert tokens_of(list(engine.submit(ask()))) == tokens_of(whole)


def test_closing_finishes_what_was_taken(
    model: Any, make_engine: Callable[..., Engine], make_gate: Callable[[Any], Gate]
) -> None:
    engine = make_engine(model, rows=2)
    streams = [engine.submit(ask(max_tokens=5)) for _ in range(6)]
    engine.close()
    assert [list(stream)[-1].finish for stream in streams] == ["length"] * 6
    with pytest.raises(Closed):
        engine.submit(ask())
    engine, gate = make_engine(model), make_gate(model)
    stream = engine.submit(ask(max_tokens=200))
    gate.allow(3)
    next(iter(stream))
    threading.Timer(0.5, gate.open).start()
    engine.close(grace_s=0.1)
    assert list(stream)[-1].finish == "cancelled"


def test_many_are_read_in_one_event_loop(model: Any, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(model)
    expected = [tokens_of(list(engine.submit(ask(index)))) for index in range(6)]
    threads = threading.active_count()

    async def read(stream: Stream) -> list[Piece]:
        return [piece async for piece in stream]

    async def read_all() -> list[list[Piece]]:
        streams = [engine.submit(ask(index)) for index in range(6)]
        assert threading.active_count() == threads
        return await asyncio.gather(*map(read, streams))

    assert [tokens_of(pieces) for pieces in asyncio.run(read_all())] == expected

    async def fail() -> None:
        await read(engine.submit(ask(timeout_s=0.0)))

    with pytest.raises(TimedOut):
        asyncio.run(fail())


def test_memory_does_not_grow(model: Any, make_engine: Callable[..., Engine]) -> None:
    engine, process = make_engine(model, rows=16), psutil.Process()

    def serve(number: int) -> int:
        for stream in [engine.submit(replace(one, max_tokens=4)) for one in crowd(number, seed=number)]:
            list(stream)
        return process.memory_info().rss

    serve(100)
    before = serve(100)
    assert serve(250) - before < 8_000_000
