"""Broken, cut, copied and leaking rows are removed with their reason; rows that only look odd stay."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from dylora_moe.data.cleaning import (
    Removed,
    find_cut,
    find_emptiness,
    find_wrong_encoding,
    remove_broken,
    remove_duplicates,
    remove_leaks,
)
from dylora_moe.data.example import Example, Message, instruction_example

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LONG = "Write a function that takes a list of numbers and gives the largest of them, or nothing if the list is empty"
ANSWER = "def largest(numbers):\n    return max(numbers, default=None)"


def example(prompt, answer=ANSWER, **changes):
    return instruction_example(prompt, answer, **{"domain": "code", "source": "test"} | changes)


@pytest.mark.parametrize(
    "text",
    [
        "perch\u00c3\u00a9 no",  # UTF-8 e acute, read as Latin-1
        "it\u00e2\u20ac\u2122s",  # an apostrophe, read as Windows-1252
        "20 \u00c2\u00b0C",
        "\u00c2\u00a0indented",
        "nice \u00f0\u0178\u02dc\u20ac",
        "\u00d0\u00bf\u00d1\u20ac\u00d0\u00b8",  # Cyrillic
        "\u00ef\u00bb\u00bfstart",  # a byte-order mark
        "lost \ufffd here",
        "null \x00 byte",
        "\x1b[31mred",
        "next \x85 line",
    ],
)
def test_wrong_encodings_are_found(text):
    assert find_wrong_encoding(text)
    for broken in (example(text), example(LONG, text + " and more")):
        assert [row.reason for row in remove_broken([broken]).removed] == ["encoding"]


@pytest.mark.parametrize(
    "text",
    [
        "plain\ttext\r\nof two lines\x0c",
        "perch\u00e9, citt\u00e0, \u00c8 vero: \u00abs\u00ec\u00bb \u2026",
        "\u00c3O PAULO, S\u00c3O, \u00c2NGULO, Fran\u00e7a",
        "\u00bbgro\u00df\u00ab, \u201eStra\u00dfe\u201c",
        "it\u2019s 20 \u00b0C \u2014 \u201cfine\u201d \u20ac5 \u2264 6",
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1, \u4f60\u597d",
        "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \ufeff",
        "\\x00 and \\u00e9 as escapes",
        "\u00e0 \u201cla\u201d, \u00e2ge, b\u00e2\u2026",
    ],
)
def test_right_encodings_stay(text):
    assert find_wrong_encoding(text) is None


@pytest.mark.parametrize("answer", ["<nooutput>", "NaN", "```python\n```", "```\n\n```", "```"])
def test_empty_answers_are_found(answer):
    assert find_emptiness(answer)


@pytest.mark.parametrize("answer", ["No", "0", "+", "None", "null", "N/A", "```python\nx\n```", "Positive", "{}"])
def test_short_answers_stay(answer):
    assert find_emptiness(answer) is None and find_cut(answer) is None


TWELVE = "one two three four five six seven eight nine ten eleven "


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Here:\n```python\nprint(1)", "not closed"),
        ("~~~\ncode\n```", "not closed"),
        ("1. First\n   ```sql\n   SELECT", "not closed"),
        (TWELVE + "x = [", r"ends in '\['"),
        (TWELVE + "call(", r"ends in '\('"),
        (TWELVE + "and the", "ends in 'the'"),
        ("def f(x):\n    return max(x,\n        key=len", "never closed"),
        ('def f(x):\n    """Gives', "unterminated triple"),
        ("import os\nprint('hello", "unterminated string"),
        ("def f(x):\n    if x > 1:\n", "indented block"),
    ],
)
def test_cut_answers_are_found(answer, found):
    assert re.search(found, find_cut(answer) or "")


@pytest.mark.parametrize(
    "answer",
    [
        "```python\nprint(1)\n```",
        "```\na\n```\ntext\n```\nb\n```",
        "````\n```\ninner\n````",
        "Use ```x``` here",
        "```x = 1```",
        "the",
        "a, b, c,",
        TWELVE + "what it is made for and how to log in",
        TWELVE + "if a > b: return a",
        "def f(x):\n    return x",
        "def f(x):\n    return x +* 2",  # wrong, but not cut
        "import os\nprint 'Python 2'",
        "import os\nprint('hello)\nprint(1)",  # the same
        "from the beginning, he said (and meant it",
        "class A {\n int x;\n};\n/* The constructor's comment. */",
        "import os\nfor name in os.listdir():\n    print name,\n" + TWELVE + "print (name),",
        "class A { int x; };\nint main() { return 0; }",
        "import java.util.*;\nclass A {}",
        "CREATE TABLE t (\n  id INT\n)",
        "for i in range(3):\n    print(i)",
        TWELVE + "...",
    ],
)
def test_whole_answers_stay(answer):
    assert find_cut(answer) is None


def test_broken_rows_are_removed_with_place_and_reason():
    rows = [example("one"), example("two", "<nooutput>"), example("three"), example("four", "```python\nx = 1")]
    cleaned = remove_broken(rows)
    assert cleaned.kept.tolist() == [0, 2]
    assert cleaned.removed == (
        Removed(index=1, reason="empty", detail="the placeholder <nooutput>"),
        Removed(index=3, reason="truncated", detail="a code block is not closed"),
    )
    assert Counter(row.reason for row in cleaned.removed) == {"empty": 1, "truncated": 1}


def test_copies_and_near_copies_are_removed_and_the_first_stays():
    other = "Explain in two sentences what a hash table is and when it is slower than a sorted list"
    rows = [example(LONG), example(other, "A table."), example(LONG), example(LONG + "!"), example(other, "A list.")]
    cleaned = remove_duplicates(rows)
    assert cleaned.kept.tolist() == [0, 1, 4]
    assert [(row.index, row.reason, row.detail, row.other) for row in cleaned.removed] == [
        (2, "duplicate", "the same as", ("", 0)),
        (3, "near_duplicate", "1.00 like", ("", 0)),
    ]
    exact = remove_duplicates(rows, similarity=None)
    assert [row.index for row in exact.removed] == [2]


def test_a_row_is_compared_with_rows_that_stay():
    """The second is like the first and the third like the second, but the third is not like the first."""
    texts = [[f"word{number}" for number in range(60)]]
    for changed in ((10, 20), (30, 40)):
        texts.append([*texts[-1]])
        for place in changed:
            texts[-1][place] = "another"
    rows = [example(" ".join(words)) for words in texts]
    (removed,) = remove_duplicates(rows).removed
    assert (removed.index, removed.detail, removed.other) == (1, "0.81 like", ("", 0))
    assert [row.index for row in remove_duplicates(rows[1:]).removed] == [1]


def test_a_row_that_stays_is_found_behind_many_copies_that_went(tmp_path):
    """Copies come first in every bucket, and are alike enough to be looked at."""
    words = [f"word{number}" for number in range(60)]

    def changed(base, *places):
        return [f"other{place}" if place in places else word for place, word in enumerate(base)]

    first = words
    copies = [changed(words, 20 + number % 40) for number in range(40)]
    apart = changed(words, 5, 12, 50)
    like_apart = [*apart, "end"]
    filler = [[f"filler{number}x{place}" for place in range(20)] for number in range(4500)]
    rows = [example(" ".join(text)) for text in (first, *copies, apart, like_apart, *filler)]
    removed = {row.index: row.other for row in remove_duplicates(rows, scratch=tmp_path).removed}
    assert set(range(1, 41)) <= removed.keys() and 41 not in removed and removed[42] == ("", 41)
    assert list(tmp_path.iterdir()) == []


def test_prompts_of_other_parts_leak_whatever_their_answer_and_domain():
    held_out = {
        "validation": [example("Short?", domain="other"), example(LONG)],
        "test": [example("What does the word serendipity mean, and where does it come from?")],
    }
    rows = [
        example("Short?", "Another answer."),
        example("Long?"),
        example(LONG + ".", "None."),
        example("What does the word serendipity mean and where does it come from"),
        example("What does the word melancholy mean, and who used it first?"),
    ]
    cleaned = remove_leaks(rows, held_out)
    assert cleaned.kept.tolist() == [1, 4]
    assert [(row.index, row.reason) for row in cleaned.removed] == [(0, "leak"), (2, "leak"), (3, "leak")]
    details = [row.detail for row in cleaned.removed]
    assert [row.other for row in cleaned.removed] == [("validation", 0), ("validation", 1), ("test", 0)]
    assert details[0] == "the prompt of" and details[1].endswith(" like that of")
    assert [row.index for row in remove_leaks(rows, held_out, similarity=None).removed] == [0]
    assert remove_leaks(rows, {"validation": []}).kept.tolist() == list(range(5))


def test_training_rows_like_each_other_do_not_leak():
    rows = [example(LONG), example(LONG + "!"), example("Short?")]
    held_out = {"validation": [example("Short"), example("short.")], "test": [example("Long"), example("long!")]}
    assert [row.index for row in remove_leaks(rows, held_out).removed] == [2]


def test_equal_digests_alone_make_no_copies_and_no_leaks(monkeypatch):
    monkeypatch.setattr("dylora_moe.data.cleaning._short_digest", lambda *texts: 7)
    rows = [example("One?"), example("Two?"), example("One?")]
    assert [row.index for row in remove_duplicates(rows, similarity=None).removed] == [2]
    held_out = {"validation": [example("Three?"), example("Four?")]}
    assert remove_leaks(rows, held_out, similarity=None).removed == ()


def test_a_prompt_that_is_asked_within_a_training_conversation_leaks():
    turns = [("user", "First?"), ("assistant", "One."), ("user", "Second?"), ("assistant", "Two.")]
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    long = Example(messages=messages, domain="d", source="s")
    assert [row.index for row in remove_leaks([long], {"validation": [example("First?", "Another.")]}).removed] == [0]
    # The longer conversation may be held out: its first answer alone is no reason to lose a training row.
    assert remove_leaks([example("First?", "Another.")], {"validation": [long]}).removed == ()


def test_a_shared_system_message_makes_no_leak():
    system = "You are a helpful assistant. " + LONG
    rows = [
        Example(
            messages=(
                Message(role="system", content=system),
                Message(role="user", content=question),
                Message(role="assistant", content="Yes."),
            ),
            domain="d",
            source="s",
        )
        for question in ("Is the sky blue?", "Is snow white?")
    ]
    assert remove_leaks(rows[:1], {"validation": rows[1:]}).removed == ()


def test_texts_without_a_prompt_leak_by_their_text():
    first, second = "The cat sat on the mat and looked at the moon.", "Rain is expected in the north by the evening."
    rows = [example("", first), example("", second)]
    cleaned = remove_leaks(
        rows, {"test": [example("", first.replace("moon", "sun").replace("mat", "roof")), example("Why?", second)]}
    )
    assert cleaned.removed == () and cleaned.kept.tolist() == [0, 1]
    cleaned = remove_leaks(rows, {"test": [example("", second)]})
    assert [row.index for row in cleaned.removed] == [1]


def test_cleaning_again_changes_nothing():
    rows = [example(f"{LONG} number {index % 7}", f"{ANSWER}  # {index % 5}") for index in range(60)]
    first = remove_duplicates(rows)
    again = remove_duplicates(rows)
    assert first.removed == again.removed and first.kept.tolist() == again.kept.tolist()
    assert remove_duplicates([rows[index] for index in first.kept]).removed == ()


def test_mbpp_asks_some_prompts_of_its_test_split_in_training():
    """The official splits by id: three prompts are word for word the same, three more but for a phrase."""
    path = SHARED / "mbpp" / "mbpp.jsonl"
    if not path.is_file():
        pytest.skip("needs the folder shared/data/mbpp beside the repository")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    parts = [
        [example(row["text"], row["code"]) for row in rows if first <= row["task_id"] <= last]
        for first, last in ((601, 974), (11, 510), (511, 600))
    ]
    held_out = {"test": parts[1], "validation": parts[2]}
    assert len(remove_leaks(parts[0], held_out, similarity=None).removed) == 3
    assert len(remove_leaks(parts[0], held_out).removed) == 6
    # Hand-written programs: none is broken, and no rule may say so.
    assert remove_broken([*parts[0], *parts[1], *parts[2]]).removed == ()


def test_few_real_rows_are_removed():
    path = SHARED / "code_alpaca" / "new_codealpaca.json"
    if not path.is_file():
        pytest.skip("needs the folder shared/data/code_alpaca beside the repository")
    rows = json.loads(path.read_text(encoding="utf-8"))
    examples = [example(f"{row['instruction']}\n\n{row['input']}", row["output"]) for row in rows]
    broken = remove_broken(examples)
    # A degree sign in UTF-8 read as Latin-1, and a call whose closing quote is missing.
    assert Counter(row.reason for row in broken.removed) == {"encoding": 1, "truncated": 1}
