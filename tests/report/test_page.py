"""The page says what the record says, escapes what data brings, and needs nothing from elsewhere."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import pytest
from jinja2 import UndefinedError

from dylora_moe.report.page import render_data
from dylora_moe.report.wording import left_out, visible


class Page(HTMLParser):
    """Texts and classes of the spans, and every address of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.spans: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self._open: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "span" and "token" in (values.get("class") or ""):
            self._open = values["class"] or ""
            self.spans.append((self._open, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open is not None:
            kind, text = self.spans[-1]
            self.spans[-1] = kind, text + data


def token(text: str, *, is_learned: bool = False, is_special: bool = False) -> dict[str, Any]:
    return {"id": 7, "text": text, "is_learned": is_learned, "is_special": is_special}


def record(domain: str = "code", tokens: Sequence[dict[str, Any]] = (), **changes: Any) -> dict[str, Any]:
    entry = {
        "domain": domain,
        "sources": ["rows.jsonl"],
        "licences": [None, "MIT"],
        "num_train": 1234,
        "num_validation": 56,
        "num_train_tokens": 10_000,
        "num_train_label_tokens": 2500,
        "lengths": {"minimum": 1, "median": 20, "p90": 30, "p99": 40, "maximum": 50, "histogram": [0, 3, 6]},
        "formats": ["alpaca (given)"],
        "num_filtered": 0,
        "num_test": 2,
        "num_unused": 0,
        "num_not_drawn": 0,
        "removed": {"leak": 3},
        "num_overlong": 0,
        "num_cut": 0,
        "num_bad_rows": 4,
        "sha256": "abc",
    }
    summary = {"domains": [{**entry, **changes}], "seed": 5, "max_length": 512, "batches": None}
    return {**summary, "samples": {domain: [list(tokens)]}}


def test_the_page_has_the_figures_and_every_token() -> None:
    tokens = [
        token("Ask:\n"),
        token(" yes", is_learned=True),
        token("<eos>", is_learned=True, is_special=True),
    ]
    page = Page(render_data(record(tokens=tokens)))
    assert page.spans == [
        ("token", "Ask:\u21b5\n"),
        ("token learned", " yes"),
        ("token learned special", "<eos>"),
    ]
    text = re.sub(r"\s+", " ", page.text)
    for expected in ("1,234", "56", "10,000", "25%", "licence unknown, MIT.", "Read as alpaca (given).", "3 tokens, 2"):
        assert expected in text
    reason = "official test split 2, unreadable 4, prompt that is validated or tested on 3."
    assert f"Left out: {reason}" in text
    heights = re.findall(r'height="([\d.]+)"', render_data(record()))
    assert list(map(float, heights)) == [0, 5, 10]


def test_epochs_and_cut_rows_are_told_where_there_are_any() -> None:
    found = {
        **record(num_cut=9, removed={}, num_test=0, num_bad_rows=0),
        "batches": {"num_batches": 8, "fill_rate": 0.5},
    }
    text = re.sub(r"\s+", " ", Page(render_data(found)).text)
    assert "An epoch has 8 batches, 50% of whose" in text and "No row was left out. Cut to fit: 9 rows." in text


@pytest.mark.parametrize("bad", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"])
def test_data_cannot_write_into_the_page(bad: str) -> None:
    page = Page(render_data(record(domain=bad, tokens=[token(bad)], sources=[bad], sha256=bad)))
    assert not {"script", "img"} & page.tags
    assert page.spans == [("token", bad)] and page.text.count(bad) == 5


def test_the_page_asks_for_nothing() -> None:
    text = render_data(record(tokens=[token("a")]))
    assert Page(text).addresses == []
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


def test_a_record_that_lacks_a_part_is_no_page_with_gaps() -> None:
    broken = record()
    del broken["domains"][0]["sha256"]
    with pytest.raises(UndefinedError, match="sha256"):
        render_data(broken)


def test_a_page_is_made_without_torch() -> None:
    code = (
        "import json, sys\n"
        "from dylora_moe.report.page import render_data\n"
        "render_data(json.loads(sys.stdin.read()))\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(record()),
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_what_is_said_has_no_zeros_and_no_hidden_line_ends() -> None:
    assert left_out(record(removed={"empty": 0}, num_test=0)["domains"][0]) == {"unreadable": 4}
    assert visible("a\r\n\n") == "a\u2190\u21b5\n\u21b5\n"
