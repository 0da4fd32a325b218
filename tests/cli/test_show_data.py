"""What is told about data: rows left out by reason, lengths as bars, tokens by what is learned."""

import io
from typing import Any, get_args

import pytest
from rich.console import Console

from dylora_moe.cli.show_data import bars, show_data, show_tokens
from dylora_moe.data.cleaning import Reason

LEFT_OUT = ("num_filtered", "num_test", "num_unused", "num_not_drawn", "num_overlong", "num_bad_rows")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=300, force_terminal=True, color_system="standard")


def printed(console: Console) -> str:
    file: Any = console.file
    return file.getvalue()


def domain(name: str, removed: dict[str, int] | None = None, **counts: int) -> dict[str, Any]:
    made = dict.fromkeys((*LEFT_OUT, "num_cut"), 0) | {"num_train": 4, "num_validation": 1, "num_train_tokens": 40}
    made |= {"num_train_label_tokens": 10} | counts
    others = {"domain": name, "licences": ["MIT", None], "formats": [], "lengths": {"maximum": 9}}
    return {**others, **made, "removed": removed or {}}


def test_rows_left_out_are_named_with_their_reason() -> None:
    console = Console(file=io.StringIO(), width=120)
    domains = [domain("some", {"leak": 2}, num_test=1234, num_cut=3), domain("none")]
    show_data(console, {"domains": domains, "batches": {"num_batches": 1234, "fill_rate": 0.947}})
    assert "an epoch: 1,234 batches; 95% of their tokens are no padding" in printed(console)
    lines = printed(console).splitlines()
    assert [line for line in lines if line.startswith(("some:", "none:"))] == [
        "some: left out: official test split 1,234, prompt that is validated or tested on 2",
        "some: 3 rows cut to max_length",
    ]
    assert "25%" in printed(console) and "MIT, unknown" in printed(console)


def test_every_reason_is_told(console: Console) -> None:
    domains = [domain("all", dict.fromkeys(get_args(Reason), 7), **dict.fromkeys(LEFT_OUT, 7))]
    show_data(console, {"domains": domains, "batches": None})
    (line,) = (line for line in printed(console).splitlines() if "left out" in line)
    assert line.count(" 7") == len(LEFT_OUT) + len(get_args(Reason))


def test_bars_are_as_high_as_their_counts() -> None:
    assert bars((0, 1, 4, 8)) == " \u2581\u2584\u2588"
    assert bars((1, 1000)) == "\u2581\u2588", "something is never nothing"


def test_tokens_show_what_is_learned_and_what_is_special(console: Console) -> None:
    def token(text: str, is_learned: bool, is_special: bool = False) -> dict[str, Any]:
        return {"text": text, "is_learned": is_learned, "is_special": is_special}

    tokens = [token("Add\n", False), token(" two", True), token("<eos>", True, True)]
    show_tokens(console, "sums", tokens)
    text = printed(console)
    assert "3 tokens, 2 learned" in text
    assert "\x1b[2mAdd\u21b5" in text and "\x1b[4;32m two" in text and "\x1b[7;32m<eos>" in text


def test_without_colour_what_is_learned_stands_between_marks() -> None:
    plain = Console(file=io.StringIO(), width=120)
    texts = [("ask", False), ("one", True), ("two", True), ("ask", False), ("end", True)]
    tokens = [{"text": text, "is_learned": is_learned, "is_special": False} for text, is_learned in texts]
    show_tokens(plain, "sums", tokens)
    assert "ask\u00abonetwo\u00bbask\u00abend\u00bb" in printed(plain)
