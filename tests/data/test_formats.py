"""Rows of every format become examples; what cannot is named."""

import re

import pytest

from dylora_moe.data.formats import FORMATS, detect_format, row_to_example
from dylora_moe.errors import DataError

ROWS = {
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "prompt_completion": {"prompt": "Add.", "completion": "3"},
    "gsm8k": {"question": "How many?", "answer": "3\n#### 3"},
    "mbpp": {"text": "Add.", "code": "def add(): ...", "test_list": ["assert a", "assert b"], "task_id": 1},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "3"},
        ]
    },
}
ANSWER_FIELD = {"alpaca": "output", "prompt_completion": "completion", "gsm8k": "answer", "mbpp": "code"}


def read(row, *, format):
    return row_to_example(row, format=format, domain="d", source="s", licence="MIT", where="rows.jsonl, line 7")


def turns(example):
    return [(message.role, message.content) for message in example.messages]


def test_every_format_has_a_row_here_and_is_detected():
    assert ROWS.keys() == FORMATS.keys()
    for name, row in ROWS.items():
        assert detect_format(row) == name


@pytest.mark.parametrize(
    ("format", "prompt", "answer"),
    [
        ("alpaca", "Add.\n\n1 and 2", "3"),
        ("prompt_completion", "Add.", "3"),
        ("gsm8k", "How many?", "3\n#### 3"),
        ("mbpp", "Add. Your code should pass these tests:\n\nassert a\nassert b", "def add(): ..."),
    ],
)
def test_a_row_becomes_a_question_and_an_answer(format, prompt, answer):
    example = read(ROWS[format], format=format)
    assert turns(example) == [("user", prompt), ("assistant", answer)]
    assert (example.domain, example.source, example.licence) == ("d", "s", "MIT")


def test_a_conversation_keeps_its_turns():
    assert turns(read(ROWS["messages"], format="messages")) == [
        ("system", "Be short."),
        ("user", "Add."),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_alpaca_without_input_is_the_instruction_alone(blank):
    assert turns(read({"instruction": "Add.", "input": blank, "output": "3"}, format="alpaca"))[0] == (
        "user",
        "Add.",
    )


def test_alpaca_takes_response_for_the_answer_but_prefers_output():
    assert read({"instruction": "Add.", "response": "3"}, format="alpaca").answer == "3"
    assert read({"instruction": "Add.", "response": "4", "output": "3"}, format="alpaca").answer == "3"


def test_mbpp_reads_the_sanitised_column_and_unix_line_ends():
    example = read({"prompt": "Add.", "code": "a\r\nb"}, format="mbpp")
    assert turns(example) == [("user", "Add."), ("assistant", "a\nb")]


@pytest.mark.parametrize("format", sorted(ANSWER_FIELD))
@pytest.mark.parametrize("value", ["missing", "", " \n", None, 3, ["3"]])
def test_an_answer_that_is_no_text_is_named_with_its_place(format, value):
    field = ANSWER_FIELD[format]
    row = {**ROWS[format], field: value}
    if value == "missing":
        del row[field]
    with pytest.raises(DataError, match=rf"^rows\.jsonl, line 7: field '{field}'"):
        read(row, format=format)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (None, "must be a list"),
        ("hello", "must be a list"),
        ([], "last message must be the assistant's"),
        (["hello"], "message 1: must be an object"),
        ([{"role": "user", "content": "Add."}], "last message must be the assistant's"),
        ([{"role": "assistant", "content": "3"}], "user message must come before"),
        ([{"role": "tool", "content": "3"}], "message 1: role must be one of"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: field 'content'.* must be text"),
        ([{"role": "user"}], "message 1: field 'content'.* is missing"),
    ],
)
def test_a_broken_conversation_is_named_with_its_place(messages, text):
    with pytest.raises(DataError, match=rf"^rows\.jsonl, line 7.*{text}"):
        read({"messages": messages}, format="messages")


def test_tests_given_as_text_are_refused_instead_of_split_into_letters():
    with pytest.raises(DataError, match="'test_list' must be a list"):
        read({**ROWS["mbpp"], "test_list": "assert a"}, format="mbpp")


def test_unknown_columns_give_the_known_formats_and_the_columns():
    with pytest.raises(DataError) as caught:
        detect_format({"conversations": [], "id": 1})
    text = str(caught.value)
    assert "conversations, id" in text
    assert all(name in text for name in FORMATS)


def test_an_unknown_format_gives_the_nearest():
    with pytest.raises(DataError, match=re.escape("Did you mean 'alpaca'?")):
        read(ROWS["alpaca"], format="alpca")
