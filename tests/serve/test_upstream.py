"""Routing here, answers from another server: our own, and ones that fail."""

import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
import requests
import torch
from tests.serve.conftest import Served

from dylora_moe.data.example import Message
from dylora_moe.data.templates import ensure_template, render_prompt
from dylora_moe.errors import ServeError
from dylora_moe.serve.metrics import Metrics
from dylora_moe.serve.route import check_routable, route
from dylora_moe.serve.upstream import Address, Upstream, find_models

WORDS = ("red stone", "pink zebra", "12 and 84", "green tulip", "def f():", "capital of France", "a", "sing")


def ask(index: int) -> Any:
    return [{"role": "user", "content": f"Say {WORDS[index]}."}]


@pytest.fixture(scope="module")
def model(make_mixture: Callable[..., Any], tokenizer: Any) -> Any:
    """Whose experts are for the first four prompts; the others are like none of them."""
    model = make_mixture("llama", granularity="sequence", router="prototype")
    ensure_template(tokenizer)
    found = []
    for index in range(4):
        prompt = render_prompt([Message(**turn) for turn in ask(index)], tokenizer)
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
        features = model.prompt_features([batch])[0]
        found.append((features / features.pow(2).mean().sqrt()).numpy())
    model.set_prototypes(np.eye(32), np.stack(found), np.full(4, 0.05), model.expert_names)
    return model


@pytest.fixture
def behind(model: Any, start_server: Callable[..., Served]) -> Served:
    return start_server(model, key="of the upstream")


def before(model: Any, start_server: Callable[..., Served], url: str, **changes: Any) -> Served:
    """A server that sends its answers on."""
    address = Address(**{"url": url, "key": "of the upstream", "timeout_s": 20.0} | changes)
    served = start_server(model)
    served.answers.metrics = metrics = Metrics(None)
    served.answers.backend = Upstream(model, served.engine.tokenizer, address, base_name="base", metrics=metrics)
    return served


def test_answers_are_those_of_the_mixture(model: Any, start_server: Callable[..., Served], behind: Served) -> None:
    assert find_models(Address(url=behind.url, key="of the upstream", timeout_s=9), model.expert_names, "x") == "base"
    front = before(model, start_server, f"{behind.url}/v1")
    direct, through = behind.client(api_key="of the upstream"), front.client()
    asked_for = set()
    for index in range(len(WORDS)):
        asked: Any = {"model": "tiny", "messages": ask(index), "max_tokens": 6, "temperature": 0}
        expected = direct.chat.completions.create(**asked).choices[0].message.content
        raw = through.chat.completions.with_raw_response.create(**asked)
        assert raw.parse().choices[0].message.content == expected
        asked_for.add(raw.headers["x-dylora-model"])
        chunks = through.chat.completions.create(**asked, stream=True, extra_body={"routing": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert asked_for == {*model.expert_names, "base"}
    for name in ("base", "expert_3"):
        one: Any = {"model": name, "prompt": "Say blue", "max_tokens": 6, "temperature": 0}
        assert through.completions.create(**one).choices[0].text == direct.completions.create(**one).choices[0].text


def test_tokens_are_counted_as_the_upstream_tells_them(
    model: Any, start_server: Callable[..., Served], behind: Served
) -> None:
    front = before(model, start_server, behind.url)
    asked: Any = {"model": "tiny", "messages": ask(0), "max_tokens": 6, "temperature": 0}
    usage = front.client().chat.completions.create(**asked).usage
    chunks = list(front.client().chat.completions.create(**asked, stream=True))
    assert usage is not None and all(chunk.choices for chunk in chunks)  # no chunk that nobody asked for
    with_usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
    last = list(front.client().chat.completions.create(**asked, **with_usage))[-1]
    assert last.usage == usage and last.choices == []
    text = requests.get(f"{front.url}/metrics", timeout=20).text
    assert f'dylora_tokens_total{{direction="in",model="tiny"}} {3.0 * usage.prompt_tokens}' in text
    assert 'dylora_tokens_total{direction="out",model="tiny"} 18.0' in text
    assert 'dylora_expert_tokens_total{expert="expert_0"} 18.0' in text
    assert 'dylora_request_seconds_count{model="tiny"} 3.0' in text


def test_a_prompt_longer_than_the_context_is_refused_before_it_is_routed(
    model: Any, start_server: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    front = before(model, start_server, "http://127.0.0.1:1")
    monkeypatch.setattr(model, "prompt_features", None)
    for prompt in ("a b " * 300, [5] * 257):
        with pytest.raises(openai.BadRequestError, match="context of 256 tokens") as caught:
            front.client().completions.create(model="tiny", prompt=prompt)
        assert caught.value.code == "context_length_exceeded"


def test_routes_are_those_of_the_whole_model(make_mixture: Callable[..., Any]) -> None:
    for routing in ({}, {"router": "prototype"}):
        model = make_mixture("llama", granularity="sequence", tap_layer=1, **routing)
        for seed in range(12):
            ids = torch.randint(3, 300, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_mask=torch.ones_like(ids).bool())
            gates = model.routing()[0, -1]
            expected = model.expert_names[int(gates.argmax())] if gates.any() else None
            assert route(model, ids[0].tolist()) == expected


def test_errors_of_the_upstream_are_told(model: Any, start_server: Callable[..., Served], behind: Served) -> None:
    front = before(model, start_server, behind.url)
    body: Any = {"model": "tiny", "messages": ask(0), "max_tokens": 5000}
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at most 200"):
        front.client().chat.completions.create(**body)
    body["max_tokens"] = 3
    wrong_key = before(model, start_server, behind.url, key="wrong")
    answer = requests.post(f"{wrong_key.url}/v1/chat/completions", json=body, timeout=20)
    assert answer.status_code == 502 and "HTTP 401" in answer.json()["error"]["message"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        slow = before(model, start_server, f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)
        for stream in (True, False):
            answer = requests.post(f"{slow.url}/v1/chat/completions", json=body | {"stream": stream}, timeout=20)
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "upstream_timeout"
        port = silent.getsockname()[1]
    answer = requests.post(f"{slow.url}/v1/chat/completions", json=body, timeout=20)
    assert answer.status_code == 502 and str(port) not in answer.text


def test_a_stream_that_the_upstream_cuts_is_told(model: Any, start_server: Callable[..., Served]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as cutting:

        def cut() -> None:
            link, _ = cutting.accept()
            link.recv(65_536)
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            link.sendall(head + b"5\r\ndata:\r\n")
            link.close()

        thread = threading.Thread(target=cut)
        thread.start()
        front = before(model, start_server, f"http://127.0.0.1:{cutting.getsockname()[1]}")
        body = {"model": "base", "messages": ask(0), "stream": True}
        answer = requests.post(f"{front.url}/v1/chat/completions", json=body, timeout=20)
        thread.join()
    assert answer.status_code == 200 and "upstream_unreachable" in answer.text


def test_answers_that_a_signal_cuts_are_told_why(model: Any, start_server: Callable[..., Served]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        front = before(model, start_server, f"http://127.0.0.1:{silent.getsockname()[1]}")
        front.server._grace_s = 0.0
        answers: list[requests.Response] = []

        def post() -> None:
            body = {"model": "base", "messages": ask(0)}
            answers.append(requests.post(f"{front.url}/v1/chat/completions", json=body, timeout=20))

        asking = threading.Thread(target=post)
        asking.start()
        link, _ = silent.accept()
        front.server.handle_exit(15, None)
        asking.join()
        link.close()
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "closing"


def test_errors_without_a_kind_get_one(model: Any, start_server: Callable[..., Served]) -> None:
    content = b'{"error": {"message": "no"}}'
    with socket.create_server(("127.0.0.1", 0)) as other:

        def refuse() -> None:
            link, _ = other.accept()
            link.recv(65_536)
            link.sendall(b"HTTP/1.1 422 No\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
            link.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        front = before(model, start_server, f"http://127.0.0.1:{other.getsockname()[1]}")
        body = {"model": "base", "messages": ask(0)}
        answer = requests.post(f"{front.url}/v1/chat/completions", json=body, timeout=20)
        thread.join()
    assert answer.status_code == 422
    assert answer.json()["error"] == {"message": "no", "type": "server_error", "param": None, "code": None}


def test_what_cannot_be_routed_by_a_prompt_alone_is_refused(make_mixture: Callable[..., Any]) -> None:
    with pytest.raises(ServeError, match="granularity sequence"):
        check_routable(make_mixture("llama", granularity="token"))
    with pytest.raises(ServeError, match="top_k 1"):
        check_routable(make_mixture("llama", granularity="sequence", top_k=2))
    with pytest.raises(ServeError, match="router_scope shared"):
        check_routable(make_mixture("llama", granularity="sequence", router_scope="per_layer"))


def test_an_upstream_must_have_all_models(model: Any, behind: Served) -> None:
    address = Address(url=behind.url, key="of the upstream", timeout_s=9)
    with pytest.raises(ServeError, match="lacks nobody"):
        find_models(address, ["expert_0", "nobody"], "base")
    with pytest.raises(ServeError, match="HTTP 401"):
        find_models(Address(url=behind.url, key=None, timeout_s=9), ["expert_0"], "base")
    with pytest.raises(ServeError, match="Start it first"):
        find_models(Address(url="http://127.0.0.1:1", key=None, timeout_s=9), ["expert_0"], "base")
