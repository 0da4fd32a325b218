"""Conversations: what is asked again, what is kept, and what a file of them holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import BASE, ROUTED, expert

from dylora_moe.data.example import Message
from dylora_moe.data.templates import ensure_template, render_prompt
from dylora_moe.errors import ServeError, TunerError
from dylora_moe.evaluate.generate import generate_answers
from dylora_moe.serve import rows
from dylora_moe.serve.request import Piece
from dylora_moe.serve.talk import Talk
from dylora_moe.tuner import DyLoraModel

QUESTIONS = ("Say red tulip.", "And again?")


@pytest.fixture
def model(make_mixture: Callable[..., Any]) -> DyLoraModel:
    return make_mixture()


@pytest.fixture
def talk(make_engine: Callable[..., Any], model: DyLoraModel, tokenizer: Any) -> Talk:
    ensure_template(tokenizer)
    return Talk(make_engine(model), max_tokens=10)


def ask(talk: Talk, question: str, speaker: Any = ROUTED) -> Any:
    return talk.ask(question, speaker, lambda piece: None)


def test_the_whole_conversation_is_what_an_answer_follows(talk: Talk, model: DyLoraModel, tokenizer: Any) -> None:
    talk.system = "Be brief."
    shown: list[Piece] = []
    first = talk.ask(QUESTIONS[0], ROUTED, shown.append)
    assert list(first.pieces) == shown and first.text
    second = ask(talk, QUESTIONS[1], BASE)
    told = [("system", "Be brief."), ("user", QUESTIONS[0]), ("assistant", first.text), ("user", QUESTIONS[1])]
    messages = [Message(role=role, content=content) for role, content in told]
    with model.disabled():
        (alone,) = generate_answers(model, tokenizer, [messages], max_new_tokens=10, end_token_ids=[1])
    assert second.text == alone.text and second.shares is None
    (forgetful,) = generate_answers(model, tokenizer, [messages[:2]], max_new_tokens=10, end_token_ids=[1])
    assert first.text == forgetful.text


def test_shares_are_those_of_the_routing(talk: Talk) -> None:
    answer = ask(talk, QUESTIONS[0])
    spoken = [piece.experts for piece in answer.pieces if piece.experts]
    assert answer.shares is not None and sum(answer.shares.values()) == pytest.approx(1)
    for name, share in answer.shares.items():
        assert share == pytest.approx(sum(each.get(name, 0) for each in spoken) / len(spoken))


def test_a_comparison_is_one_batch_and_changes_no_conversation(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, step = list[int](), rows.Rows.step
    monkeypatch.setattr(rows.Rows, "step", lambda self, ids: (sizes.append(len(ids)), step(self, ids))[1])
    kept = ask(talk, QUESTIONS[0], expert(2))
    sizes.clear()
    compared = talk.compare([BASE, ROUTED, expert(2)])
    assert max(sizes) == 3 and len(sizes) <= 10
    assert compared[2].text == kept.text and talk.turns[-1].answer is kept
    assert [each.text for each in compared] == [
        ask(talk_alone(talk), QUESTIONS[0], s).text for s in (BASE, ROUTED, expert(2))
    ]


def talk_alone(talk: Talk) -> Talk:
    return Talk(talk._engine, max_tokens=10)


def test_what_fails_leaves_the_conversation_as_it_was(talk: Talk, tokenizer: Any) -> None:
    with pytest.raises(ServeError, match="must have been asked"):
        talk.compare([BASE])
    ask(talk, QUESTIONS[0])
    with pytest.raises(TunerError, match="no expert"):
        ask(talk, QUESTIONS[1], expert(9))
    with pytest.raises(ServeError, match="leave room for an answer"):
        ask(talk, "word " * 300)
    with pytest.raises(TunerError, match="no expert"):
        talk.compare([BASE, expert(9)])
    assert [turn.question for turn in talk.turns] == [QUESTIONS[0]]
    assert ask(talk, QUESTIONS[1]).text


def test_an_answer_is_shorter_where_the_context_ends(talk: Talk, tokenizer: Any) -> None:
    text = render_prompt([Message(role="user", content="a")], tokenizer)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    talk = Talk(talk._engine, max_tokens=10_000)
    answer = ask(talk, "a", expert(1))
    assert len(answer.pieces) == 256 - length or answer.finish == "stop"


def test_ctrl_c_keeps_what_was_written(talk: Talk) -> None:
    seen: list[Piece] = []

    def stop(piece: Piece) -> None:
        seen.append(piece)
        if len(seen) == 4:
            raise KeyboardInterrupt

    answer = talk.ask(QUESTIONS[0], BASE, stop)
    assert answer.finish == "cancelled" and list(answer.pieces) == seen and len(seen) == 4
    assert talk.turns[-1].answer is answer and ask(talk, QUESTIONS[1]).finish != "cancelled"


def test_a_file_has_a_line_for_each_conversation_and_is_never_written_over(talk: Talk, tmp_path: Path) -> None:
    talk.system = "Be brief."
    first, second = ask(talk, QUESTIONS[0]), ask(talk, QUESTIONS[1], expert(1))
    compared = talk.compare([BASE, expert(0)])
    talk.clear()
    talk.clear()
    third = ask(talk, QUESTIONS[1], BASE)
    path = tmp_path / "talk.jsonl"
    assert talk.save(path) == 2
    earlier, now = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [each["role"] for each in earlier["messages"]] == roles
    assert [each["content"] for each in earlier["messages"][1:]] == [
        QUESTIONS[0],
        first.text,
        QUESTIONS[1],
        second.text,
    ]
    assert [each["speaker"] for each in earlier["answered"]] == ["routed", "expert-expert_1"]
    assert [each["content"] for each in earlier["compared"][0]["answers"]] == [each.text for each in compared]
    assert now["messages"][-1]["content"] == third.text and now["answered"][0]["speaker"] == "base"
    before = path.read_bytes()
    with pytest.raises(ServeError, match="must be new"):
        talk.save(path)
    assert path.read_bytes() == before
    with pytest.raises(ServeError, match="can be written"):
        talk.save(tmp_path / "no" / "such.jsonl")
