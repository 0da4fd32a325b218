"""The server by OpenAI's own client: answers of mixture, base and experts, and what goes with them."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import requests
from tests.serve.conftest import BASE, ROUTED, Served, expert, text_of

from dylora_moe.data.example import Message
from dylora_moe.data.templates import render_prompt
from dylora_moe.evaluate.load import Speaker
from dylora_moe.serve.names import name_speakers
from dylora_moe.serve.request import Request

ASK: Any = [{"role": "user", "content": "Say blue river in capitals."}]
MODELS = {"tiny": ROUTED, "base": BASE, "expert_2": expert(2)}


@pytest.fixture(scope="module")
def model(make_mixture: Callable[..., Any]) -> Any:
    return make_mixture("llama", granularity="token", top_k=2)


@pytest.fixture
def served(model: Any, start_server: Callable[..., Served]) -> Served:
    return start_server(model)


def direct(served: Served, speaker: Speaker, **changes: Any) -> Any:
    """The engine's own answer to `ASK`."""
    prompt = render_prompt([Message(role="user", content=ASK[0]["content"])], served.engine.tokenizer)
    settings: dict[str, Any] = {"prompt": prompt, "speaker": speaker, "max_tokens": 12} | changes
    return list(served.engine.submit(Request(**settings)))


def test_mixture_base_and_expert_stream_their_own_answers(served: Served) -> None:
    client, texts = served.client(), set()
    assert [one.id for one in client.models.list()] == ["tiny", "base", *(f"expert_{n}" for n in range(4))]
    for name, speaker in MODELS.items():
        expected = text_of(direct(served, speaker))
        asked: Any = {"model": name, "messages": ASK, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 5
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert whole.usage is not None and whole.usage.completion_tokens == 12
        texts.add(expected)
    assert len(texts) == 3


def test_plain_completions_continue_text_and_tokens(served: Served) -> None:
    client = served.client()
    ids = served.engine.encode("Say blue river", add_special_tokens=True)
    given: list[Any] = ["Say blue river", ids]
    whole = [client.completions.create(model="base", prompt=one, temperature=0, max_tokens=9) for one in given]
    expected = text_of(direct(served, BASE, prompt=ids, max_tokens=9))
    assert [one.choices[0].text for one in whole] == [expected] * 2
    both = client.completions.create(model="base", prompt=["Say blue", "Add 3 and"], n=2, temperature=0, max_tokens=5)
    texts = [choice.text for choice in both.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3] and [choice.index for choice in both.choices] == [0, 1, 2, 3]
    parts = client.completions.create(model="base", prompt=ids, temperature=0, max_tokens=9, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected
    assert client.completions.create(model="base", prompt="Add").usage.completion_tokens == 16  # type: ignore[union-attr]


def test_routing_tells_who_served_each_token(served: Served) -> None:
    expected = direct(served, ROUTED)
    asked: Any = {"model": "tiny", "messages": ASK, "max_tokens": 12, "temperature": 0}
    client, extra = served.client(), {"routing": True}
    whole = client.chat.completions.create(**asked, extra_body=extra).choices[0]
    chunks = list(client.chat.completions.create(**asked, extra_body=extra, stream=True))
    routing: Any = whole.model_extra["routing"]  # type: ignore[index]
    streamed = [one for chunk in chunks for one in (chunk.choices[0].model_extra or {}).get("routing", [])]
    assert routing == streamed and len(routing) == 12
    assert "".join(one["token"] for one in routing) == whole.message.content
    for one, piece in zip(routing, expected, strict=True):
        assert one["experts"] == pytest.approx(piece.experts, abs=1e-5) and len(one["experts"]) == 2
    plain = client.chat.completions.create(**asked).choices[0]
    assert "routing" not in (plain.model_extra or {})


def test_log_probabilities_are_the_engines(served: Served) -> None:
    expected = direct(served, BASE, logprobs=3)
    asked: Any = {"model": "base", "messages": ASK, "max_tokens": 12, "temperature": 0, "logprobs": True}
    logs = served.client().chat.completions.create(**asked, top_logprobs=3).choices[0].logprobs
    assert logs is not None and logs.content is not None
    assert [one.logprob for one in logs.content] == pytest.approx([piece.logprob for piece in expected], abs=1e-4)
    assert [len(one.top_logprobs) for one in logs.content] == [3] * 12
    assert all(one.bytes is None or bytes(one.bytes).decode() == one.token for one in logs.content)
    text = served.client().completions.create(model="base", prompt="Add 3", max_tokens=4, temperature=0, logprobs=2)
    plain = text.choices[0].logprobs
    assert plain is not None and plain.tokens is not None and len(plain.tokens) == 4
    assert plain.text_offset is not None and plain.text_offset[0] == 0


def test_seeds_choices_stops_and_usage(served: Served) -> None:
    client = served.client()
    asked: Any = {"model": "tiny", "messages": ASK, "max_tokens": 10, "temperature": 1.1}
    first, again = (client.chat.completions.create(**asked, seed=5, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 3
    assert first.usage is not None and first.usage.completion_tokens == 30
    whole = client.chat.completions.create(**asked | {"temperature": 0}).choices[0].message.content or ""
    stop = whole[4:7]
    cut = client.chat.completions.create(**asked | {"temperature": 0}, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    chunks = list(client.chat.completions.create(**asked, stream=True, n=2, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_fields_are_ignored_or_refused_as_openai_does(served: Served) -> None:
    client = served.client()
    asked: Any = {"model": "base", "messages": ASK, "max_tokens": 2}
    client.chat.completions.create(**asked, user="me", frequency_penalty=0, store=False, metadata={"a": "b"})
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    client.chat.completions.create(**asked | {"messages": parts})
    for wrong, param in (
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"top_logprobs": 2}, None),
        ({"temperature": 2.5}, "temperature"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"extra_body": {"top_k": 3}}, "top_k"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asked | wrong)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError, match="there are tiny, base, expert_0") as missing:
        client.chat.completions.create(**asked | {"model": "gpt-4o"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context of 256") as long:
        client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": "blue river " * 200}]})
    assert long.value.code == "context_length_exceeded"


def test_an_answer_is_sent_back_as_the_client_holds_it(served: Served) -> None:
    client = served.client()
    asked: Any = {"model": "base", "max_tokens": 3, "temperature": 0}
    message = client.chat.completions.create(**asked, messages=ASK).choices[0].message
    plain: Any = {"role": "assistant", "content": message.content}
    texts = [
        client.chat.completions.create(**asked, messages=[*ASK, one, *ASK]).choices[0].message.content
        for one in (plain, message, message.model_dump())
    ]
    assert len(set(texts)) == 1
    with pytest.raises(openai.BadRequestError, match=r"messages\.1\.tool_calls"):
        client.chat.completions.create(**asked, messages=[*ASK, plain | {"tool_calls": [{"id": "a"}]}, *ASK])


def test_a_wrong_field_is_named_as_it_was_sent(served: Served) -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    ask: dict[str, Any] = {"model": "base", "messages": ASK}
    for path, body, param, said in (
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [part]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ("chat/completions", {"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ("chat/completions", {"a list[b]": 5}, "a list[b]", "Unrecognized"),
        ("completions", {"messages": None, "prompt": [[1, "x"]]}, "prompt.0.1", "integer"),
    ):
        sent = {key: value for key, value in (ask | body).items() if value is not None}
        error = requests.post(f"{served.url}/v1/{path}", json=sent, timeout=20).json()["error"]
        assert error["param"] == param and said in error["message"], error


def test_streams_count_and_place_as_whole_answers_do(served: Served) -> None:
    client = served.client()
    asked: Any = {"model": "base", "prompt": "Say blue", "max_tokens": 6, "seed": 3, "logprobs": 2, "temperature": 2}
    whole = client.completions.create(**asked).choices[0].logprobs
    streamed = [part.choices[0].logprobs for part in client.completions.create(**asked, stream=True)]
    assert whole is not None and whole.text_offset is not None and len(set(whole.text_offset)) > 2
    assert [at for part in streamed if part is not None for at in part.text_offset or []] == whole.text_offset
    assert whole.tokens is not None and whole.top_logprobs is not None
    for token, log, likeliest in zip(whole.tokens, whole.token_logprobs or [], whole.top_logprobs, strict=True):
        assert likeliest[token] == log  # also of tokens that are none of the likeliest
    usages = [client.completions.create(**asked | {"n": n, "prompt": ["Say blue", "Add"]}).usage for n in (1, 3)]
    assert usages[0] is not None and usages[1] is not None
    assert usages[0].prompt_tokens == usages[1].prompt_tokens
    assert usages[0].completion_tokens * 3 == usages[1].completion_tokens
    body = {
        "model": "base",
        "messages": ASK,
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text = requests.post(f"{served.url}/v1/chat/completions", json=body, timeout=20).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_an_answer_without_a_limit_has_what_room_there_is(model: Any, start_server: Callable[..., Served]) -> None:
    served = start_server(model, tokens=60, most_tokens=1000)
    answer = served.client().chat.completions.create(model="base", messages=ASK, temperature=0)
    assert answer.usage is not None and answer.usage.total_tokens == 60


def test_many_at_once_get_their_own_answers(served: Served) -> None:
    names = ["tiny", "base", "expert_0", "expert_3"] * 6
    words = ["red stone", "pink zebra", "green tulip"] * 8
    client = served.client()

    def one(index: int) -> str | None:
        ask: Any = [{"role": "user", "content": f"Say {words[index]} {index} in capitals."}]
        asked: Any = {"model": names[index], "messages": ask, "max_tokens": 8 + index % 5, "temperature": 0}
        return client.chat.completions.create(**asked).choices[0].message.content

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(one, range(24)))
    assert together == [one(index) for index in range(24)] and len(set(together)) > 12


def test_health_metrics_and_the_page(served: Served) -> None:
    client = served.client()
    client.chat.completions.create(model="expert_1", messages=ASK, max_tokens=7)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="x\n" * 40, messages=ASK, max_tokens=7)
    for path in ("/health", "/ready", "/"):
        answer = requests.get(served.url + path, timeout=20)
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    text = requests.get(f"{served.url}/metrics", timeout=20).text
    assert 'dylora_requests_total{endpoint="/v1/chat/completions",model="expert_1",status="200"} 1.0' in text
    assert 'model="unknown",status="404"} 1.0' in text
    assert 'dylora_expert_tokens_total{expert="expert_1"} 7.0' in text
    assert 'dylora_tokens_total{direction="out",model="expert_1"} 7.0' in text
    assert 'dylora_first_token_seconds_count{model="expert_1"} 1.0' in text
    assert "dylora_rows 0.0" in text and "dylora_waiting 0.0" in text


def test_names_that_are_taken_are_solved() -> None:
    named = name_speakers("base", ["base", "one", "base-2"])
    assert list(named) == ["mixture-base", "base", "expert-base", "one", "base-2"]
    assert named["base"] == BASE and named["mixture-base"] == ROUTED
    assert named["expert-base"] == Speaker(kind="expert", expert="base")
    assert list(name_speakers("a", ["a", "expert-a"])) == ["a", "base", "expert-a", "expert-expert-a"]
