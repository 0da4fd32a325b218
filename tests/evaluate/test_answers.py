"""Which answers can be compared, and how many are right."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.data.example import instruction_example
from dylora_moe.errors import DataError
from dylora_moe.evaluate import accuracy, answers
from dylora_moe.evaluate.answers import evaluate_answers, matching_of
from dylora_moe.evaluate.held_out import held_out
from dylora_moe.evaluate.load import load_run
from dylora_moe.run_dir import RunDir


def silent(line: str) -> None:
    pass


def examples(texts: list[str]) -> Any:
    return [instruction_example(f"ask {n}", text, domain="d", source="s") for n, text in enumerate(texts)]


def kind(texts: list[str]) -> str | None:
    found = matching_of(examples(texts))
    return found and found.kind


def test_answers_that_can_be_compared_are_told_from_free_text() -> None:
    assert kind(["yes", "no"] * 8) == "label"
    assert kind([f"Steps.\n#### {number}" for number in range(9)]) == "final"
    assert kind([f"SELECT a FROM t{number}" for number in range(9)]) == "exact"
    assert kind([f"Two lines.\nAnd {number}" for number in range(9)]) is None
    assert kind(["long " * 60 + str(number) for number in range(9)]) is None


def test_only_the_number_after_the_mark_counts() -> None:
    matching = matching_of(examples([f"Steps.\n#### {number},000" for number in range(9)]))
    assert matching is not None
    matched = matching.matched
    assert matched("Other steps #1.\n#### 1,000 ") == matched("Steps.\n#### 1000") == "1000"
    assert matched("#### 1,000\nHow many are left?\n#### 7") == "1000", "what goes on after the answer was not asked"
    assert matched("1000") != matched("Steps.\n#### 1000")
    assert matched("no mark at all") not in ("", "1000")


def test_a_run_and_its_base_are_asked(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    generate, asked = accuracy.generate_answers, []

    def note(model: Any, tokenizer: Any, conversations: Any, **how: Any) -> Any:
        asked.append((model.state.disabled, len(conversations)))
        return generate(model, tokenizer, conversations, **how)

    monkeypatch.setattr(accuracy, "generate_answers", note)
    found = evaluate_answers(run, rows=3, tell=silent)
    assert json.loads(json.dumps(found)) == RunDir(run).read("eval/answers.json")
    for domain in found["domains"]:
        assert (domain["rows"], domain["rows_there"]) == (3, 6) and set(domain["speakers"]) == {"base", "routed"}
        assert all(0 <= each["share"] <= 1 for each in domain["speakers"].values())
    per_speaker = [sum(count for off, count in asked if off == disabled) for disabled in (True, False)]
    assert per_speaker == [3 * len(found["domains"])] * 2
    assert found["model"] == RunDir(run).model_digest()


def test_the_part_that_is_compared_is_that_of_the_domain(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    first = answers.Matching(kind="exact", matched=lambda text: text[:1])
    monkeypatch.setattr(answers, "matching_of", lambda examples: first)
    generate, drawn = accuracy.generate_answers, list[str]()
    trained = load_run(run, progress=silent)
    held = held_out(trained, "validation", silent).examples
    right = {each.messages[0].content: each.answer for domain in held.values() for each in domain}

    def answer(model: Any, tokenizer: Any, conversations: Any, **how: Any) -> Any:
        """The mixture begins as it should, the base does not."""
        found = generate(model, tokenizer, conversations, **(how | {"max_new_tokens": 1}))
        asked = [each[0].content for each in conversations]
        drawn.extend(asked)
        texts = ["~" if model.state.disabled else right[question][:1] + " and so on" for question in asked]
        return [replace(each, text=text) for each, text in zip(found, texts, strict=True)]

    monkeypatch.setattr(accuracy, "generate_answers", answer)
    for domain in evaluate_answers(run, rows=4, tell=silent)["domains"]:
        assert domain["speakers"]["routed"]["share"] == 1.0 and domain["speakers"]["base"]["share"] == 0.0
        assert domain["against_base"]["difference"] == 1.0
        here = [each.messages[0].content for each in held[domain["domain"]]]
        asked = [question for question in drawn if question in here]
        assert len(set(asked)) == 4 and set(asked) != set(here[:4]), "files may be sorted, so rows are drawn"


def test_free_text_alone_is_refused(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "matching_of", lambda examples: None)
    with pytest.raises(DataError, match="are free text"):
        evaluate_answers(finished_run, tell=silent)
