"""Servers with OpenAI's interface: what is sent, what comes back, and how it fails."""

import asyncio
import json
import time
from collections.abc import Callable

import pytest

from dylora_moe.data.example import Message
from dylora_moe.errors import GeneratorError
from dylora_moe.generate.clients import Failure, Reply, Request
from dylora_moe.generate.clients.endpoint import EndpointClient, _parse, _retry_after

Serve = Callable[..., str]
REQUEST = Request(messages=(Message(role="user", content="Ciao?"),), max_tokens=9, temperature=0.5, top_p=0.9, seed=1)


def ask(urls: list[str], number: int = 1, **changes: float | None) -> list[Reply | BaseException]:
    """So many at a time."""
    settings = {"timeout_s": 1.0, "in_flight": 8, "requests_per_minute": None, **changes}
    client = EndpointClient(urls, "stub", key_variable="NO_SUCH_KEY", **settings)  # type: ignore[arg-type]

    async def run() -> list[Reply | BaseException]:
        found = await asyncio.gather(*(client.complete(REQUEST) for _ in range(number)), return_exceptions=True)
        await client.close()
        return found

    return asyncio.run(run())


def test_an_answer_comes_with_its_counts(serve: Serve) -> None:
    url = serve()
    (reply,) = ask([url + "/"])
    assert isinstance(reply, Reply) and reply.is_whole and len(reply.text.split()) == 12
    assert (reply.tokens_in, reply.tokens_out, reply.where) == (20, 14, url)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "HTTP 500"),
        ("429", "HTTP 429"),
        ("slow", "no answer in time"),
        ("cut", "connection: ClientPayloadError"),
        ("malformed", "a malformed answer"),
        ("empty", "a malformed answer"),
    ],
)
def test_faults_have_their_reasons(serve: Serve, fault: str, reason: str) -> None:
    url = serve(faults={fault: 1.0})
    (failure,) = ask([url])
    assert isinstance(failure, Failure) and (failure.reason, failure.where, failure.is_final) == (reason, url, False)
    assert failure.wait_s == (0.01 if fault == "429" else None)


def test_what_is_no_address_or_takes_no_key_ends_it(serve: Serve) -> None:
    (refused,) = ask([serve(faults={"401": 1.0})])
    assert isinstance(refused, GeneratorError) and "NO_SUCH_KEY" in str(refused)
    (gone,) = ask(["http://127.0.0.1:9/v1"])
    assert isinstance(gone, Failure) and gone.reason == "connection: ClientConnectorError"


def test_requests_go_to_all_machines(serve: Serve) -> None:
    urls = [serve(delay_s=0.1), serve(delay_s=0.1)]
    found = ask(urls, 8)
    assert [sum(reply.where == url for reply in found if isinstance(reply, Reply)) for url in urls] == [4, 4]


def test_a_machine_that_fails_again_and_again_is_left_alone(serve: Serve) -> None:
    good, bad = serve(delay_s=0.05), serve(faults={"500": 1.0}, delay_s=0.05)
    client = EndpointClient([bad, good], "stub", key_variable="NO_SUCH_KEY", timeout_s=1.0, in_flight=2)

    async def run() -> list[Reply | BaseException]:
        found = []
        for _ in range(12):
            found += await asyncio.gather(client.complete(REQUEST), return_exceptions=True)
        await client.close()
        return found

    found = asyncio.run(run())
    assert isinstance(found[0], Failure) and sum(isinstance(each, Reply) for each in found[1:]) >= 10


@pytest.mark.parametrize("count", [10**400, -3, True, "7", 2.5, None])
def test_a_count_of_tokens_that_is_none_is_not_taken(count: object) -> None:
    record = {"choices": [{"message": {"content": "sì"}}], "usage": {"prompt_tokens": count}}
    assert _parse(json.dumps(record).encode(), "u").tokens_in is None


def test_an_answer_that_was_filtered_is_not_whole_and_one_too_deep_is_malformed() -> None:
    def parse(reason: str | None) -> bool:
        record = {"choices": [{"message": {"content": "sì"}, "finish_reason": reason}]}
        return _parse(json.dumps(record).encode(), "u").is_whole

    assert parse("stop") and parse(None) and not parse("length") and not parse("content_filter")
    with pytest.raises(Failure, match="malformed"):
        _parse(b'{"choices": ' + b"[" * 100_000, "u")


def test_a_key_is_stripped_and_one_that_cannot_be_sent_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setenv("NO_SUCH_KEY", "sk-secret\r\n")
    assert isinstance(ask([serve()], 1)[0], Reply)
    monkeypatch.setenv("NO_SUCH_KEY", "sk-sec\nret")
    with pytest.raises(GeneratorError, match="must be of printable ASCII characters") as error:
        ask([serve()], 1)
    assert "sec" not in str(error.value)


def test_a_machine_that_asks_to_wait_is_left_alone_for_so_long(serve: Serve) -> None:
    url, other = serve(faults={"429": 1.0}, retry_after=0.6), serve(faults={"500": 1.0})
    took = []
    for address in (url, other):
        client = EndpointClient([address], "stub", key_variable="NO_SUCH_KEY", timeout_s=1.0, in_flight=2)

        async def run(client: EndpointClient = client) -> float:
            began = time.monotonic()
            for _ in range(4):
                await asyncio.gather(client.complete(REQUEST), return_exceptions=True)
            await client.close()
            return time.monotonic() - began

        took.append(asyncio.run(run()))
    assert took[0] >= 1.7 and took[1] < 1.0  # nothing is waited for that nobody asked for


def test_requests_keep_a_pace(serve: Serve) -> None:
    began = time.monotonic()
    assert all(isinstance(reply, Reply) for reply in ask([serve()], 8, requests_per_minute=600.0))
    assert time.monotonic() - began >= 0.7


def test_a_wish_to_wait_is_seconds_or_a_date() -> None:
    assert (_retry_after("3"), _retry_after("0.5"), _retry_after("-1")) == (3.0, 0.5, 0.0)
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _retry_after(None) is _retry_after("") is _retry_after("soon") is None
