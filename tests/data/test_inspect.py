"""Tokens as text: nothing lost, characters of several tokens whole, learned and special ones told apart."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.test_build import pairs, tokenizer, write

from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.build import build_data
from dylora_moe.data.example import instruction_example
from dylora_moe.data.inspect import pick_rows, view_row
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.tokenize import IGNORED, tokenize_example

__all__ = ["tokenizer"]


@pytest.mark.parametrize(
    "answer", ["one two", " b\n\n  c", "na\u00efve caf\u00e9", "\U0001f600\U0001f600 \u65e5\u672c", ""]
)
def test_the_texts_joined_are_the_row(tokenizer: Any, answer: str) -> None:
    row = tokenize_example(
        instruction_example("Say \u00e9.", answer + "x", domain="d", source="s"), tokenizer, max_length=500
    )
    views = view_row(TokenizedRow(input_ids=row.input_ids, labels=row.labels, domain=0), tokenizer)
    assert "".join(view.text for view in views) == tokenizer.decode(row.input_ids)
    assert [view.id for view in views] == list(row.input_ids)
    assert "".join(view.text for view in views if view.is_learned) == answer + "x<eos>"
    assert [view.text for view in views if view.is_special] == ["<eos>"]


def test_what_is_learned_follows_the_labels(tokenizer: Any) -> None:
    row = TokenizedRow(input_ids=(10, 11, 12), labels=(IGNORED, 11, IGNORED), domain=0)
    assert [view.is_learned for view in view_row(row, tokenizer)] == [False, True, False]


def test_rows_are_picked_from_short_to_long(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [(f"q {n}", "word " * n) for n in range(1, 31)])
    other = write(tmp_path / "b.jsonl", pairs("b", 10))
    data = build_data([path, other], tokenizer, DataSettings(max_length=500))
    picked = pick_rows(data, 3)
    assert list(picked) == ["a", "b"]
    lengths = [len(row) for row in picked["a"]]
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] < lengths[2]
    assert all(row.domain == 1 for row in picked["b"]) and len(pick_rows(data, 100)["b"]) == 9
