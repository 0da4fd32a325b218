"""An answer by itself; how often the checks err on real text is in tests/benchmarks/test_checks.py."""

import pytest

from dylora_moe.data.example import Message
from dylora_moe.generate.checks import REASONS, check_answer
from dylora_moe.generate.clients import Reply
from dylora_moe.generate.questions import Question

ITALIAN = "La parola che cerchi si usa quando parliamo di cose belle."


def check(
    answer: str, question: str = "Come si usa questa parola?", language: str | None = "it", **reply: bool
) -> list[str]:
    said = Reply(text=answer, is_whole=reply.get("is_whole", True), tokens_in=None, tokens_out=None, where="")
    asked = Question(messages=(Message(role="user", content=question),), source="", licence=None)
    found = check_answer(said, asked, language)
    assert set(found) <= set(REASONS)
    return found


@pytest.mark.parametrize("answer", ["", "  \n", "...", "42!"])
def test_an_answer_without_letters_is_empty(answer: str) -> None:
    assert check(answer) == ["empty"]


def test_an_answer_in_its_language_passes_and_others_do_not() -> None:
    assert check(ITALIAN) == check("Sì, certo.") == []
    english = "The word that you look for is used when we talk about nice things."
    assert check(english) == ["language"] and check(english, language=None) == []


@pytest.mark.parametrize("mark", ["<|im_end|>", "</s>[INST] ciao", "<think>Vediamo.</think>", "<end_of_turn>"])
def test_marks_of_chat_templates_do_not_pass(mark: str) -> None:
    assert check(f"{ITALIAN} {mark}") == ["marks"] and check(f"{ITALIAN} 3 < 4 e <b>5</b>") == []


def test_an_answer_that_was_cut_off() -> None:
    assert check(ITALIAN, is_whole=False) == ["cut_off"]


@pytest.mark.parametrize(
    ("answer", "echo"),
    [
        ("What is the word for red?", True),
        ("what is the WORD for red", True),
        ("What is the word for red? It is rosso.", True),
        ("The word for red is what?", True),
        ('"Rosso" is the word for red.', False),
        ("Red, in Italian, is rosso.", False),
    ],
)
def test_an_echo_says_the_question_and_hardly_a_word_more(answer: str, echo: bool) -> None:
    assert check(answer, "What is the word for red?", None) == (["repeats_question"] if echo else [])


def test_an_answer_out_of_a_text_in_the_question_is_no_echo() -> None:
    text = "Lester Menke was born in 1918. He was a farmer. He served in the Air Force, and then in the House."
    assert check("He was a farmer and served in the Air Force.", f"What did he do? {text}", None) == []


@pytest.mark.parametrize(
    "answer",
    ["I'm sorry, but I can't help with that.", "I\u2019m unable to answer.", "Mi dispiace, ma non posso rispondere."],
)
def test_a_refusal_is_one_where_it_begins_the_answer(answer: str) -> None:
    assert check(answer, language=None) == ["refusal"]
    assert check(f"{ITALIAN * 4} Per rifiutare diciamo: {answer}", language=None) == []
