"""Text of tokens as they come: whole characters, all of them together, and cut at stop strings."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dylora_moe.serve.text import StopStrings, TextStream


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.add(token) for token in ids), stream.rest()]


@pytest.mark.parametrize("text", ["Say blue river.", "naïve 日本語 🙂👩‍👩‍👧 é", "🙂🙂", " two  spaces\n", "\ufffd!"])
def test_no_half_character_is_given(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text
    assert len([piece for piece in found if piece]) >= min(len(text), 5) - 3


def test_any_tokens_come_to_the_text_of_all(tokenizer: Any) -> None:
    draw = random.Random(5)
    for _ in range(60):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 40))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_half_a_character_at_the_end_is_given_as_such(tokenizer: Any) -> None:
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]
    assert pieces(tokenizer, ids)[0] == "a" and pieces(tokenizer, ids)[-1] == "\ufffd"


@given(st.lists(st.text("abc", max_size=3), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_an_answer_is_cut_at_the_first_stop_to_be_complete(tokens: list[str], strings: list[str]) -> None:
    stops, given_, stopped = StopStrings[int](strings), [], False
    for number, text in enumerate(tokens):
        new, stopped = stops.add(number, text)
        given_ += new
        if stopped:
            break
        assert not any(string in "".join(text for _, text in given_) for string in strings)
    if not stopped:
        given_ += stops.rest()
    whole = "".join(tokens)
    ends = [place for place in range(len(whole) + 1) if any(whole[:place].endswith(string) for string in strings)]
    assert stopped == bool(ends)
    text = "".join(text for _, text in given_)
    assert whole.startswith(text) and not any(string in text for string in strings)
    if not stopped:
        assert text == whole and [number for number, _ in given_] == list(range(len(tokens)))
    else:
        assert any(whole[len(text) :].startswith(string) for string in strings)


def test_a_token_is_held_back_only_while_it_may_be_a_stop() -> None:
    stops = StopStrings[str](["END"])
    assert stops.add("1", "aE") == ([], False)
    assert stops.add("2", "N") == ([], False)
    assert stops.add("3", "x") == ([("1", "aE"), ("2", "N"), ("3", "x")], False)
    assert stops.add("4", "E") == ([], False)
    assert stops.add("5", "NDless") == ([("4", ""), ("5", "")], True)
