"""A base without a chat template gets ours, and what ends an answer is known."""

import pytest
from tests.data.chat_templates import CHATML, NO_END, example, make_tokenizer
from transformers import AutoTokenizer

from dylora_moe.data.templates import ensure_template, render_prompt
from dylora_moe.data.tokenize import (
    tokenize_examples,
)
from dylora_moe.errors import DataError


def test_the_plain_template_is_stored_with_the_tokenizer(tmp_path):
    tokenizer = make_tokenizer(puts_bos=True)
    template = ensure_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == template
    assert render_prompt(example().prompt, loaded) == "<bos>### User:\nWrite one.\n\n### Assistant:\n"


def test_a_template_that_is_there_is_kept():
    tokenizer = make_tokenizer(CHATML)
    assert ensure_template(tokenizer) == tokenizer.chat_template == CHATML


def test_a_tokenizer_without_any_end_stops():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        tokenize_examples([example()], tokenizer)
    tokenizer.chat_template = NO_END
    with pytest.raises(DataError, match="must end in a special token"):
        tokenize_examples([example()], tokenizer)
