"""Which answers can be compared, and how many are right."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.data.example import instruction_example
from dylora_moe.errors import DataError
from dylora_moe.evaluate import accuracy, answers
from dylora_moe.evaluate.answers import evaluate_answers, matching_of
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


def test_free_text_alone_is_refused(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "matching_of", lambda examples: None)
    with pytest.raises(DataError, match="are free text"):
        evaluate_answers(finished_run, tell=silent)
