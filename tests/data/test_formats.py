"""Rows of every format become examples; what cannot is named."""

import re

import pytest

from dylora_moe.data.formats import FORMATS, detect_format, row_to_examples
from dylora_moe.errors import DataError

ROWS = {
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "evol": {"instruction": "Add.", "output": "3"},
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
    "sharegpt": {"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}], "id": "a"},
    "cima": {
        "past_convo": ['"Tree" is "albero".', "il albero?"],
        "engPrep": "is behind the",
        "engColor": "pink",
        "engObj": "tree",
        "tutorResponses": ["Almost. ", "Which article?"],
    },
    "classification": {"sentence": "It rained.\n", "label": "weather"},
    "translation": {"eng": "Hello.", "ita": "Ciao.", "id": 5},
    "text": {"text": "Once upon a time"},
}
ANSWER_FIELD = {
    "alpaca": "output",
    "evol": "output",
    "prompt_completion": "completion",
    "gsm8k": "answer",
    "mbpp": "code",
    "text": "text",
}


def read_all(row, *, format):
    return row_to_examples(row, format=format, domain="d", source="s", licence="MIT", where="rows.jsonl, line 7")


def read(row, *, format):
    [example] = read_all(row, format=format)
    return example


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
        ("evol", "Add.", "3"),
        ("sharegpt", "Add.", "3"),
        ("translation", "Translate into Italian: Hello.", "Ciao."),
        ("text", "", "Once upon a time"),
        ("classification", "Which label fits the text? Answer with the label alone.\n\nText: It rained.", "weather"),
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
        ([{"role": "user", "content": []}], "message 1: field 'content'.* must be text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], "message 1: field 'content'.*part 2"),
        ([{"role": "user", "content": [{"type": "image", "text": "a"}]}], "message 1: field 'content'.*part 1"),
        ([{"role": "user", "content": [{"type": "text", "text": " "}]}], "message 1: field 'content'.* must hold text"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], "message 1: tool_calls are not read"),
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
        detect_format({"chat": [], "id": 1})
    text = str(caught.value)
    assert "chat, id" in text
    assert all(name in text for name in FORMATS)


def test_an_unknown_format_gives_the_nearest():
    with pytest.raises(DataError, match=re.escape("Did you mean 'alpaca'?")):
        read(ROWS["alpaca"], format="alpca")


@pytest.mark.parametrize("key", ["text", "value"])
def test_content_in_parts_is_put_together(key):
    parts = [{"type": "text", key: "Add "}, {"type": "text", key: "1."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "3", "loss_weight": 1.0}]
    assert turns(read({"messages": messages}, format="messages")) == [("user", "Add 1."), ("assistant", "3")]


def test_prompt_and_answer_are_prompt_and_completion():
    row = {"prompt": "Add.", "answer": "3"}
    assert detect_format(row) == "prompt_completion"
    assert turns(read(row, format="prompt_completion")) == [("user", "Add."), ("assistant", "3")]


def test_sharegpt_calls_of_tools_are_turns_in_tags():
    row = {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather"}'},
            {"from": "observation", "value": '{"sun": 1}'},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": '[{"name": "weather"}]',
    }
    assert turns(read(row, format="sharegpt")) == [
        ("system", 'Be short.\n\nYou may call these tools:\n<tools>\n[{"name": "weather"}]\n</tools>'),
        ("user", "Weather?"),
        ("assistant", '<tool_call>\n{"name": "weather"}\n</tool_call>'),
        ("user", '<tool_response>\n{"sun": 1}\n</tool_response>'),
        ("assistant", "Sunny."),
    ]
    assert turns(read({**ROWS["sharegpt"], "system": "Be short.", "tools": ""}, format="sharegpt")) == [
        ("system", "Be short."),
        ("user", "Add."),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize(
    ("conversations", "text"),
    [
        ("hello", "must be a list"),
        (["hello"], "turn 1: must be an object"),
        ([{"from": "alien", "value": "a"}], "turn 1: from must be one of"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}], "turn 2: field 'value'"),
        ([{"from": "human", "value": "a"}], "last message must be the assistant's"),
    ],
)
def test_a_broken_sharegpt_row_is_named_with_its_place(conversations, text):
    with pytest.raises(DataError, match=rf"^rows\.jsonl, line 7.*{text}"):
        read({"conversations": conversations}, format="sharegpt")


def test_every_reply_of_a_tutor_is_an_example_as_it_stands():
    before = [
        ("user", 'How do I say "is behind the pink tree" in Italian?'),
        ("assistant", '"Tree" is "albero".'),
        ("user", "il albero?"),
    ]
    examples = read_all(ROWS["cima"], format="cima")
    assert [turns(example) for example in examples] == [
        [*before, ("assistant", "Almost. ")],
        [*before, ("assistant", "Which article?")],
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"past_convo": ["a"]}, "'past_convo' must be pairs"),
        ({"past_convo": []}, "'past_convo' must be pairs"),
        ({"past_convo": ["a", " "]}, "past_convo: field 'item 2'"),
        ({"tutorResponses": []}, "must hold a reply"),
        ({"tutorResponses": ["a", ""]}, "tutorResponses: field 'item 2'"),
        ({"engObj": ""}, "field 'engObj'"),
    ],
)
def test_a_broken_exercise_is_named_with_its_place(change, text):
    with pytest.raises(DataError, match=rf"^rows\.jsonl, line 7.*{text}"):
        read_all({**ROWS["cima"], **change}, format="cima")


@pytest.mark.parametrize("label", ["sport", 1, "1"])
def test_a_label_is_a_name_or_a_place_in_the_list(label):
    example = read({"text": "Goal!", "label": label, "labels": ("weather", "sport")}, format="classification")
    assert example.answer == "sport" and "Labels: weather, sport\n\nText: Goal!" in example.prompt[0].content


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"label": "sports"}, "must be one of weather, sport, got 'sports'"),
        ({"label": 2}, "got 2 with 2 labels"),
        ({"label": -1}, "got -1 with 2 labels"),
        ({"label": True}, "must be text, got bool"),
        ({"label": 1, "labels": None}, "got 1 with 0 labels.*labels.json"),
    ],
)
def test_a_label_outside_the_list_is_named(change, text):
    row = {"text": "Goal!", "labels": ["weather", "sport"], **change}
    with pytest.raises(DataError, match=rf"^rows\.jsonl, line 7: field 'label'.*{text}"):
        read(row, format="classification")


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"italian": "Ciao.", "english": "Hello."}, "Translate into Italian: Hello.", "Ciao."),
        ({"de": "Hallo.", "fr": "Salut."}, "Translate into French: Hallo.", "Salut."),
        ({"id": "1", "translation": {"en": "Hello.", "it": "Ciao."}}, "Translate into Italian: Hello.", "Ciao."),
    ],
)
def test_a_translation_goes_into_the_language_that_is_not_english(row, prompt, answer):
    assert detect_format(row) == "translation"
    assert turns(read(row, format="translation")) == [("user", prompt), ("assistant", answer)]


def test_a_translation_needs_two_languages():
    with pytest.raises(DataError, match=r"two columns named after languages.*got english, note"):
        read({"english": "Hello.", "note": "x"}, format="translation")
