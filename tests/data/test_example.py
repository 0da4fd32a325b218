"""The record that all data becomes: what it accepts, what it refuses, and what it hands out."""

import dataclasses

import pytest

from dylora_moe.data.example import Example, Message, instruction_example
from dylora_moe.errors import DataError


def conversation(*turns: tuple[str, str]) -> Example:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Example(messages=messages, domain="maths", source="gsm8k")


def test_prompt_is_everything_before_the_last_answer():
    example = conversation(
        ("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4")
    )

    assert [message.content for message in example.prompt] == ["Be brief.", "1+1?", "2", "2+2?"]
    assert example.answer == "4"


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([], "last message must be the assistant's"),
        ([("user", "1+1?")], "last message must be the assistant's"),
        ([("user", "1+1?"), ("assistant", "2"), ("user", "thanks")], "last message must be the assistant's"),
        ([("assistant", "2")], "user message must come before"),
        ([("system", "Be brief."), ("assistant", "2")], "user message must come before"),
        ([("user", "1+1?"), ("assistant", " \n\t")], "answer must hold text"),
        ([("human", "1+1?"), ("assistant", "2")], "'human'"),
    ],
)
def test_refuses_what_cannot_be_learned_and_names_the_source(turns: list[tuple[str, str]], text: str):
    with pytest.raises(DataError, match=text) as caught:
        conversation(*turns)

    assert "source 'gsm8k', domain 'maths'" in str(caught.value)


def test_records_are_frozen_and_hashable():
    example = conversation(("user", "1+1?"), ("assistant", "2"))

    assert len({example, conversation(("user", "1+1?"), ("assistant", "2"))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.domain = "code"  # pyright: ignore[reportAttributeAccessIssue]


def test_instruction_example():
    example = instruction_example("1+1?", "2", domain="maths", source="local.jsonl", licence="MIT")

    assert example.messages == (Message(role="user", content="1+1?"), Message(role="assistant", content="2"))
    assert (example.domain, example.source, example.licence) == ("maths", "local.jsonl", "MIT")


def test_instruction_example_puts_the_system_message_first():
    example = instruction_example("1+1?", "2", domain="maths", source="x", system="Be brief.")

    assert example.prompt[0] == Message(role="system", content="Be brief.")
    assert example.licence is None


def test_half_of_a_surrogate_pair_is_no_text():
    with pytest.raises(DataError, match=r"valid Unicode.*Mend the row"):
        instruction_example("question", "answer \ud83d", domain="d", source="s")
    assert instruction_example("question", "\U0001f600", domain="d", source="s").answer == "\U0001f600"
