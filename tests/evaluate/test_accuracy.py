"""Which skills choose a label, and right answers counted on a tiny model whose answers are known."""

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import WORDS

from dylora_moe.data.example import Example, Message, instruction_example
from dylora_moe.data.sources import SplitExample, parse_dataset_spec, read_source
from dylora_moe.errors import DataError
from dylora_moe.evaluate.accuracy import labels_of, measure_accuracy
from dylora_moe.evaluate.generate import Answer, generate_answers

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PROMPTS = [f"Say {word} in capitals." for word in WORDS[:18]] + ["Add 3 and 21."] * 2
NO_END = (10**6,)


def examples(answers: list[str]) -> list[Example]:
    return [instruction_example(f"Text {n}", answer, domain="d", source="s") for n, answer in enumerate(answers)]


def test_labels_are_few_short_answers_that_come_again() -> None:
    found = labels_of(examples(["World", "Science or  Technology", " world ", "Sports\n"] * 4))
    assert found == ("Science or Technology", "Sports", "World")


def test_other_rows_tell_whether_answers_are_labels() -> None:
    few = examples(["World", "Sports", "Business"])
    assert labels_of(few) is None and labels_of(few, ["World", "Sports"]) is None
    assert labels_of(few, ["World", "Sports ", "Arts"] * 10) == ("Arts", "Business", "Sports", "World")
    assert labels_of(few, ["World", "x" * 41] * 10) is None


@pytest.mark.parametrize(
    "answers",
    [
        ["yes", "no", "maybe"] * 3,  # each only three times
        ["yes"] * 20,
        ["yes", "no", "one two three four five six"] * 10,
        ["yes", "no", "x" * 41] * 10,
        [str(number) for number in range(31)] * 10,
        [f"def f{number}(): ..." for number in range(20)],
        [],
    ],
)
def test_other_answers_are_free_text(answers: list[str]) -> None:
    assert labels_of(examples(answers)) is None


def test_the_bounds_themselves_are_labels() -> None:
    assert labels_of(examples(["yes", "no"] * 4)) == ("no", "yes")
    assert labels_of(examples(["a b c d e", "x" * 40] * 4)) is not None
    assert len(labels_of(examples([str(number) for number in range(30)] * 4)) or ()) == 30


def test_a_conversation_of_several_turns_chooses_no_label() -> None:
    turns = [Message(role=role, content="yes") for role in ("system", "user", "assistant")]
    single = [Example(messages=tuple(turns), domain="d", source="s")] * 10 + examples(["no"] * 10)
    assert labels_of(single) == ("no", "yes")
    assert labels_of([*single, Example(messages=(*turns, *turns[1:]), domain="d", source="s")]) is None


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("continual/agnews", 4),
        ("continual/amazon", 5),
        ("continual/dbpedia", 14),
        ("continual/yahoo", 10),
        ("gsm8k", None),
        ("mbpp/mbpp.jsonl", None),
    ],
)
def test_real_skills_are_told_apart(path: str, number: int | None) -> None:
    if not (SHARED / path).exists():
        pytest.skip(f"needs shared/data/{path} beside the repository")
    rows: list[SplitExample] = []
    read_source(parse_dataset_spec({"path": str(SHARED / path)}), seed=0, add=rows.append)
    for part in (rows, rows[:100]):
        found = labels_of([row.example for row in part])
        assert (found and len(found)) == number


@pytest.fixture(scope="module")
def answered(mixture: Any, tokenizer: Any, data: Any) -> tuple[Any, list[Answer], list[int]]:
    """A model, its answers to PROMPTS one at a time, and the ids that end them, each after a few tokens."""
    model = mixture(granularity="token")

    def ask(prompt: str, ends: list[int]) -> Answer:
        conversation = [Message(role="user", content=prompt)]
        (answer,) = generate_answers(model, tokenizer, [conversation], max_new_tokens=6, end_token_ids=ends)
        return answer

    ends = list(range(0, len(tokenizer), 2))
    return model, [ask(prompt, ends) for prompt in PROMPTS], ends


def test_an_answer_is_right_when_it_is_the_label(answered: Any, tokenizer: Any) -> None:
    model, answers, ends = answered
    right = [place for place, answer in enumerate(answers) if answer.stopped and answer.text.strip()]
    assert len(right) >= 4, "the model must end some answers"
    labels = [answer.text if place in right else "blue" for place, answer in enumerate(answers)]
    labels[right[0]] = f"  {labels[right[0]].upper()} "  # the same label in another spelling
    labels[right[1]] += " and more"
    asked = zip(["Add 3 and 22.", *PROMPTS], ["a", *labels], strict=True)  # the first label is the shortest
    rows = [instruction_example(prompt, label, domain="d", source="s") for prompt, label in asked]
    passes: list[int] = []
    for batch_size in (1, 4):
        found = measure_accuracy(
            model,
            tokenizer,
            rows,
            batch_size=batch_size,
            end_token_ids=ends,
            before_batch=lambda size=batch_size: passes.append(size),
        )
        assert found == pytest.approx((len(right) - 1) / len(rows))
    assert (passes.count(1), passes.count(4)) == (21, 6)


def test_an_answer_that_only_begins_with_the_label_is_wrong(answered: Any, tokenizer: Any) -> None:
    model = answered[0]

    def begin(prompt: str) -> str:
        conversation = [Message(role="user", content=prompt)]
        return generate_answers(model, tokenizer, [conversation], max_new_tokens=1, end_token_ids=NO_END)[0].text

    begun = ((prompt, begin(prompt)) for prompt in PROMPTS)
    prompt, label = next(found for found in begun if len(tokenizer(found[1])["input_ids"]) == 1 and found[1].strip())
    rows = [instruction_example(prompt, label, domain="d", source="s")]
    assert measure_accuracy(model, tokenizer, rows, batch_size=1, end_token_ids=NO_END) == 0.0


def test_no_examples_are_refused(answered: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="at least one example"):
        measure_accuracy(answered[0], tokenizer, [], batch_size=1, end_token_ids=[1])
