"""Labels are the answer and its end token, nothing else, for every kind of template."""

import numpy as np
import pytest
from tests.data.chat_templates import BARE, CHATML, MORE_BEHIND, NO_END, example, make_tokenizer

from dylora_moe.data.example import Example, Message
from dylora_moe.data.templates import render_prompt
from dylora_moe.data.tokenize import (
    IGNORED,
    UNLEARNED_START,
    Tokenized,
    check_labels,
    fit_to_length,
    quantile,
    tokenize_example,
    tokenize_examples,
)
from dylora_moe.errors import DataError
from dylora_moe.tuner import RoutingConfig

ANSWERS = ["def f():\n    return 1", "t", "  indented\n", "4"]


def learned(row, tokenizer):
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


KINDS = [
    pytest.param(None, {}, "{answer}<eos>", id="plain"),
    pytest.param(None, {"puts_bos": True}, "{answer}<eos>", id="plain-bos"),
    pytest.param(CHATML, {}, "{answer}<|im_end|>", id="chatml"),
    pytest.param(CHATML, {"eos": "<|im_end|>"}, "{answer}<|im_end|>", id="chatml-eos"),
    pytest.param(MORE_BEHIND, {}, "{answer}<|im_end|>", id="more-behind"),
    pytest.param(CHATML.replace("<|im_end|>", "<eos>!"), {}, "{answer}<eos>!", id="end-begins-as-eos"),
    pytest.param(BARE, {"puts_bos": True}, " {trimmed}<eos>", id="bare"),
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(("template", "kind", "expected"), KINDS)
def test_the_answer_and_its_end_token_are_learned_and_nothing_else(template, kind, expected, answer):
    tokenizer = make_tokenizer(template, **kind)
    rows = tokenize_examples([example(answer)], tokenizer)
    (row,) = rows.rows
    assert learned(row, tokenizer) == expected.format(answer=answer, trimmed=answer.strip())
    assert row.labels[row.prompt_length :] == row.input_ids[row.prompt_length :]
    assert set(row.labels[: row.prompt_length]) == {IGNORED}
    assert rows.end_token_ids == (row.labels[-1],)


@pytest.mark.parametrize(("template", "kind", "expected"), KINDS)
def test_the_prompt_is_what_generation_gives_the_model(template, kind, expected):
    tokenizer = make_tokenizer(template, **kind)
    row = tokenize_example(example(), tokenizer, max_length=200)
    turns = [{"role": "user", "content": "Write one."}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(row.input_ids[: row.prompt_length]) == ids
    text = render_prompt(example().prompt, tokenizer)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    num_bos = 1 if kind.get("puts_bos") else 0
    assert row.input_ids.count(tokenizer.bos_token_id) == num_bos == ids[:1].count(tokenizer.bos_token_id)


def test_a_template_without_end_token_gets_eos_and_loses_its_last_blanks():
    tokenizer = make_tokenizer(NO_END)
    row = tokenize_example(example("one \n"), tokenizer, max_length=200)
    assert learned(row, tokenizer) == "\nassistant: one \n<eos>"


def conversation(*turns):
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Example(messages=messages, domain="d", source="s")


TURNS = [("system", "Be short."), ("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "last")]


@pytest.mark.parametrize(
    ("learn", "expected"),
    [
        ("last_answer", "last<|im_end|>"),
        ("answers", "first<|im_end|>last<|im_end|>"),
        ("all", None),
    ],
)
def test_of_a_conversation_is_learned_what_was_asked_for(learn, expected):
    tokenizer = make_tokenizer(CHATML)
    (row,) = tokenize_examples([conversation(*TURNS)], tokenizer, learn=learn).rows
    whole = tokenizer.decode(row.input_ids)
    if expected is None:
        expected = tokenizer.decode(row.input_ids[UNLEARNED_START:])
    assert learned(row, tokenizer) == expected
    turns = [{"role": role, "content": content} for role, content in TURNS]
    assert whole + "\n" == tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("answer", ["a", "b" * 10, "c" * 40])
def test_of_a_text_without_a_prompt_the_start_is_not_learned(answer):
    """It decides the expert, which then must not be trained to predict it."""
    tokenizer = make_tokenizer(CHATML)
    (row,) = tokenize_examples([conversation(("user", ""), ("assistant", answer))], tokenizer, learn="answers").rows
    (asked,) = tokenize_examples([conversation(("user", "q"), ("assistant", answer))], tokenizer, learn="answers").rows
    number = len(tokenizer(answer).input_ids)
    assert asked.num_labels == number + 1
    assert row.num_labels == max(2, number + 1 - UNLEARNED_START)
    assert row.labels[-2:] == row.input_ids[-2:]
    assert row.labels[: row.prompt_length] == (IGNORED,) * row.prompt_length


def test_the_start_is_what_the_tuner_routes_by():
    assert RoutingConfig().prefix_tokens == UNLEARNED_START


def test_a_template_without_end_token_ends_the_conversation_only():
    tokenizer = make_tokenizer(NO_END)
    (row,) = tokenize_examples([conversation(*TURNS)], tokenizer, learn="answers").rows
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    assert learned(row, tokenizer) == "\nassistant: first\nassistant: last<eos>"


def test_a_template_that_rewrites_earlier_answers_can_only_teach_the_last():
    """As those that drop the reasoning of all turns but the last one."""
    hides = CHATML.replace("m['content'] +", "(m['content'] if loop.last or m['role'] != 'assistant' else '...') +")
    with pytest.raises(DataError, match="render a conversation as its beginning with more after it"):
        tokenize_examples([conversation(*TURNS)], make_tokenizer(hides), learn="answers")
    tokenizer = make_tokenizer(hides)
    (row,) = tokenize_examples([conversation(*TURNS)], tokenizer, learn="last_answer").rows
    assert learned(row, tokenizer) == "last<|im_end|>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # The generation prompt opens the turn in other words than the conversation does.
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>model\n'"), "answer after it, but the prompt"),
        ("{{ messages[0]['content'] }}", "keep the answer as it is"),
        # As templates that cut reasoning out of answers do.
        (CHATML.replace("m['content'] +", "m['content'].split('#')[-1] +"), "must write the answer as it is"),
        (CHATML.replace("m['content'] +", "m['contents'] +"), "must render a question and an answer"),
        ("{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML, "too long"),
    ],
)
def test_a_template_that_does_not_fit_stops(template, text):
    turns = [("system", "s"), ("user", "Write one."), ("assistant", "return 1 # one")]
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    with pytest.raises(DataError, match=text):
        tokenize_examples([Example(messages=messages, domain="d", source="s")], make_tokenizer(template))


def test_an_end_token_inside_an_answer_stops():
    with pytest.raises(DataError, match="must not contain the end token"):
        tokenize_examples([example("a<eos>b")], make_tokenizer())


@pytest.mark.parametrize("labels", [(IGNORED, IGNORED, IGNORED), (IGNORED, IGNORED, 9), (IGNORED, 5, 6)])
def test_rows_that_teach_nothing_or_no_end_stop(labels):
    row = Tokenized(input_ids=(4, 5, 9), labels=labels)
    with pytest.raises(DataError, match="label"):
        check_labels(row, (9,), "a row")


def rows_of(lengths):
    return [Tokenized(input_ids=tuple(range(n)), labels=tuple(range(n))) for n in lengths]


def test_overlong_rows_stop_with_the_lengths_that_would_fit():
    with pytest.raises(DataError) as caught:
        fit_to_length(rows_of([*range(1, 200), 5000]), max_length=196, overlong="error")
    text = str(caught.value)
    assert "4 of 200" in text and "longest has 5000" in text
    assert "max_length=198 fits 99 %" in text and "max_length=5000 all" in text
    with pytest.raises(DataError, match="max_length=10 tokens, but 1 of 1"):
        tokenize_example(example("return 1 " * 20), make_tokenizer(), max_length=10)


def fitted(lengths, overlong):
    found = fit_to_length(rows_of(lengths), max_length=4, overlong=overlong)
    return [(index, row.input_ids) for index, row in found.rows], found.num_dropped, found.num_cut


def test_overlong_rows_become_what_was_asked_for():
    short = [(0, (0, 1, 2)), (2, (0, 1, 2, 3))]
    assert fitted([3, 9, 4], "drop") == (short, 1, 0)
    assert fitted([3, 3], "error") == ([(0, (0, 1, 2)), (1, (0, 1, 2))], 0, 0)
    assert fitted([3, 9, 4], "truncate") == ([short[0], (1, (0, 1, 2, 3)), short[1]], 0, 1)
    parts = [(1, (0, 1, 2, 3)), (1, (4, 5, 6, 7))]
    assert fitted([3, 9, 4], "split") == ([short[0], *parts, short[1]], 0, 1), "one token alone teaches nothing"


def test_what_is_cut_keeps_its_labels_and_is_left_out_without_any():
    row = Tokenized(input_ids=(1, 2, 3, 4, 5, 6, 7, 8), labels=(IGNORED, IGNORED, IGNORED, IGNORED, 5, 6, 7, 8))
    assert fit_to_length([row], max_length=4, overlong="truncate").rows == ()
    assert fit_to_length([row], max_length=4, overlong="truncate").num_dropped == 1
    ((_, part),) = fit_to_length([row], max_length=6, overlong="truncate").rows
    assert part.labels == (IGNORED, IGNORED, IGNORED, IGNORED, 5, 6)
    ((_, part),) = fit_to_length([row], max_length=4, overlong="split").rows
    assert (part.input_ids, part.labels) == ((5, 6, 7, 8), (IGNORED, IGNORED, 7, 8))


@pytest.mark.parametrize(("fraction", "value"), [(0.01, 1), (0.5, 2), (0.75, 3), (0.76, 4), (0.99, 4), (1.0, 4)])
def test_a_quantile_is_a_value_that_covers_the_fraction(fraction, value):
    assert quantile(np.array([1, 2, 3, 4]), fraction) == value
