"""What goes wrong: the right status each time, in OpenAI's shape, and the server goes on."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serve.conftest import Gate, Served

ASK: Any = [{"role": "user", "content": "Say blue river in capitals."}]
LONG: Any = {"model": "tiny", "messages": ASK, "max_tokens": 190, "temperature": 0}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(make_mixture: Callable[..., Any]) -> Any:
    return make_mixture("llama", granularity="sequence")


def until(holds: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it must come to hold"
        time.sleep(0.01)


def assert_error(answer: requests.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    return error


def test_a_client_that_leaves_makes_room(
    model: Any, start_server: Callable[..., Served], make_gate: Callable[[Any], Gate]
) -> None:
    served, gate = start_server(model, rows=1), make_gate(model)
    for streams in (True, False):
        body = json.dumps(LONG | {"stream": streams}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as link:
            link.sendall(head.encode() + body)
            gate.allow(5)
            until(lambda: served.engine.snapshot().rows == 1)
        until(lambda: served.answers.under_way == 0)
        gate.allow(5)  # of the 190 that the whole answer takes
        until(lambda: served.engine.snapshot().rows == 0)
    text = requests.get(f"{served.url}/metrics", timeout=20).text
    assert f'dylora_requests_total{{endpoint="{CHAT}",model="tiny",status="499"}} 2.0' in text


def test_a_full_queue_says_when_to_come_again(
    model: Any, start_server: Callable[..., Served], make_gate: Callable[[Any], Gate]
) -> None:
    served, gate = start_server(model, rows=1, waiting=1), make_gate(model)
    streams = [served.client().chat.completions.create(**LONG, stream=True)]
    gate.allow(1)
    until(lambda: served.engine.snapshot().rows == 1)
    streams.append(served.client().chat.completions.create(**LONG, stream=True))
    answer = requests.post(served.url + CHAT, json=LONG, timeout=20)
    assert assert_error(answer, 429)["code"] == "queue_full" and int(answer.headers["retry-after"]) >= 1
    several = requests.post(served.url + CHAT, json=LONG | {"n": 3}, timeout=20)
    assert_error(several, 429)
    for stream in streams:
        stream.close()
    until(lambda: served.answers.under_way == 0)
    gate.open()
    until(lambda: served.engine.snapshot().rows == 0)
    patient = served.client(max_retries=5).chat.completions.create(**LONG | {"max_tokens": 2})
    assert patient.choices[0].finish_reason == "length"


def test_an_answer_that_takes_too_long_is_told(model: Any, start_server: Callable[..., Served]) -> None:
    served = start_server(model, timeout_s=0.02)
    assert_error(requests.post(served.url + CHAT, json=LONG, timeout=20), 504)
    with pytest.raises(openai.APIError, match=r"within 0\.02 s"):
        list(served.client().chat.completions.create(**LONG, stream=True))
    text = requests.get(f"{served.url}/metrics", timeout=20).text
    assert f'dylora_requests_total{{endpoint="{CHAT}",model="tiny",status="504"}} 2.0' in text


def test_a_wrong_key_opens_nothing(model: Any, start_server: Callable[..., Served], caplog: Any) -> None:
    served = start_server(model, key="open sesame")
    right = {"Authorization": "Bearer open sesame"}
    wrong = [{}, {"Authorization": "Bearer "}, {"Authorization": "open sesame"}, {"Authorization": "Bearer open"}]
    for headers in [*wrong, {"Authorization": "Basic open sesame"}, {"Authorization": b"Bearer \xff\xfe"}]:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
            answer = requests.get(served.url + path, headers=headers, timeout=20)
            assert assert_error(answer, 401)["code"] == "invalid_api_key"
        assert_error(requests.post(served.url + CHAT, json=LONG, headers=headers, timeout=20), 401)
    assert requests.get(f"{served.url}/v1/models", headers=right, timeout=20).status_code == 200
    assert {requests.get(served.url + path, timeout=20).status_code for path in ("/", "/health", "/ready")} == {200}
    assert len(served.client(api_key="open sesame").models.list().data) == 6
    with pytest.raises(openai.AuthenticationError):
        served.client(api_key="sesame").models.list()
    assert "sesame" not in caplog.text


def test_only_local_names_are_answered(model: Any, start_server: Callable[..., Served]) -> None:
    served = start_server(model)
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil:80",
        "evil:localhost",
        "",
        "10.0.0.1",
        "0.0.0.0",
    ):
        assert_error(requests.get(f"{served.url}/v1/models", headers={"Host": host}, timeout=20), 403)
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:9", "127.0.0.2", "[::1]", "[::1]:80"):
        assert requests.get(f"{served.url}/v1/models", headers={"Host": host}, timeout=20).status_code == 200
    answer = requests.options(served.url + CHAT, headers={"Origin": "http://evil.example"}, timeout=20)
    assert "access-control-allow-origin" not in answer.headers


HOSTILE: dict[str, tuple[Any, str, int]] = {
    "no json": (b"{", "application/json", 400),
    "no object": (b"[]", "application/json", 400),
    "nothing": (b"", "application/json", 400),
    "not utf-8": (b'{"model": "\xff\xfe"}', "application/json", 400),
    "half a surrogate": (
        json.dumps({"model": "base", "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
        "application/json",
        400,
    ),
    "deep": (b"[" * 50_000, "application/json", 400),
    "deep inside": (b'{"model": ' + b'{"a":' * 9000 + b"1" + b"}" * 9000 + b"}", "application/json", 400),
    "a long number": (b'{"model": ' + b"9" * 9000 + b"}", "application/json", 400),
    "no number": (json.dumps(LONG | {"temperature": float("nan")}).encode(), "application/json", 400),
    "another type": (json.dumps(LONG).encode(), "text/plain", 400),
    "too large": (b"x" * 100_001, "application/json", 413),
    "a role that is none": (
        json.dumps(LONG | {"messages": [{"role": "root", "content": "a"}]}).encode(),
        "application/json",
        400,
    ),
    "a path": (json.dumps(LONG | {"model": "../../etc/passwd"}).encode(), "application/json", 404),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused(model: Any, start_server: Callable[..., Served], name: str) -> None:
    served = start_server(model)
    body, kind, status = HOSTILE[name]
    assert_error(requests.post(served.url + CHAT, data=body, headers={"Content-Type": kind}, timeout=20), status)
    assert served.engine.snapshot().rows == 0


def test_a_body_without_a_length_is_limited_too(model: Any, start_server: Callable[..., Served]) -> None:
    served = start_server(model)
    parts = (b"x" * 1000 for _ in range(200))
    headers = {"Content-Type": "application/json"}
    assert_error(requests.post(served.url + CHAT, data=parts, headers=headers, timeout=20), 413)


def test_paths_and_methods_that_are_none(model: Any, start_server: Callable[..., Served]) -> None:
    served = start_server(model)
    assert_error(requests.get(f"{served.url}/v1/none", timeout=20), 404)
    wrong = requests.get(served.url + CHAT, timeout=20)
    assert_error(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert requests.get(f"{served.url}/health", headers=upgrade, timeout=20).json() == {"status": "ok"}
    assert_error(requests.get(f"{served.url}/v1/models/none", timeout=20), 404)
    assert requests.get(f"{served.url}/v1/models/base", timeout=20).json()["kind"] == "base"


# Values of every kind for every field of the schema, and for none.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def test_bodies_made_from_the_schema_get_an_answer_or_an_error(model: Any, start_server: Callable[..., Served]) -> None:
    served = start_server(model, most_tokens=4)
    schema = requests.get(f"{served.url}/openapi.json", timeout=20).json()
    session = requests.Session()
    kinds = {CHAT: "ChatRequest", "/v1/completions": "CompletionRequest"}
    fields = {path: sorted(schema["components"]["schemas"][kind]["properties"]) for path, kind in kinds.items()}
    seen: set[int] = set()

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(fields)))
        body: dict[str, Any] = {"model": "base", "messages": ASK} if path == CHAT else {"model": "base", "prompt": "a"}
        body |= {"max_tokens": 2}
        names = st.sampled_from(fields[path]) | st.text(max_size=5)
        body |= data.draw(st.dictionaries(names, JSON | st.integers(0, 2), max_size=2))
        headers = {"Content-Type": "application/json"}
        answer = session.post(served.url + path, data=json.dumps(body), headers=headers, timeout=30)
        seen.add(answer.status_code)
        if answer.status_code != 200:
            assert answer.status_code in (400, 404)
            assert_error(answer, answer.status_code)

    ask()
    assert {200, 400} <= seen
    assert served.client().chat.completions.create(**LONG | {"max_tokens": 2}).usage is not None


def test_a_pass_that_fails_tells_nothing_of_why(
    model: Any, start_server: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start_server(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(model.lm, "forward", fail)
    answer = requests.post(served.url + CHAT, json=LONG, timeout=20)
    assert_error(answer, 500)
    assert "secret" not in answer.text
    monkeypatch.undo()
    monkeypatch.setattr(type(served.answers), "model", fail)
    answer = requests.get(f"{served.url}/v1/models", timeout=20)
    assert_error(answer, 500)
    assert "secret" not in answer.text


@pytest.mark.parametrize("grace_s", [30.0, 0.3])
def test_a_signal_lets_answers_be_finished(
    model: Any, start_server: Callable[..., Served], make_gate: Callable[[Any], Gate], grace_s: float
) -> None:
    served, gate = start_server(model, grace_s=grace_s), make_gate(model)
    streams = [served.client().chat.completions.create(**LONG, stream=True) for _ in range(4)]
    kept = requests.Session()
    assert kept.get(f"{served.url}/ready", timeout=20).status_code == 200
    ends: list[Any] = [None] * 4

    def read(index: int) -> None:
        try:
            ends[index] = list(streams[index])[-1].choices[0].finish_reason
        except openai.APIError as error:
            ends[index] = error.message

    readers = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    for reader in readers:
        reader.start()
    gate.allow(10)
    until(lambda: served.engine.snapshot().rows == 4)
    served.server.handle_exit(15, None)
    assert kept.get(f"{served.url}/ready", timeout=20).status_code == 503
    assert_error(kept.post(served.url + CHAT, json=LONG, timeout=20), 503)
    if grace_s < 1:
        until(lambda: served.engine._is_dropping)
    gate.open()
    for reader in readers:
        reader.join(60)
    if grace_s > 1:
        assert ends == ["length"] * 4
    else:
        assert all("server is closing" in end for end in ends)
