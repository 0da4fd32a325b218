"""The page of a stream says what its figures say, shades what changed, and escapes every name."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

import pytest
from jinja2 import UndefinedError

from dylora_moe.evaluate.forgetting import StageFigures, summarise
from dylora_moe.report.page import render_stream


class Page(HTMLParser):
    """Text, tags, and the cells of every table as (text, style)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.rows: list[list[tuple[str, str]]] = []
        self._in_row = False
        self.feed(text)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
            self._in_row = True
        elif tag in ("td", "th"):
            self.rows[-1].append(("", dict(attrs).get("style") or ""))

    def handle_endtag(self, tag: str) -> None:
        self._in_row = self._in_row and tag != "tr"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_row and self.rows[-1]:
            text, style = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data).strip(), style

    def row(self, *texts: str) -> list[tuple[str, str]]:
        """The first row that begins with these texts."""
        return next(row for row in self.rows if [text for text, _ in row[: len(texts)]] == list(texts))


def decision(expert: str | None, **changes: Any) -> dict[str, Any]:
    numbers = {"held_out_auroc": 0.98765, "rows": 1256, "bound": None}
    return {"kind": "grow", "expert": expert, "reason": "Nothing is like it.", "numbers": numbers} | changes


def record(names: tuple[str, ...] = ("code", "news", "code_2"), **changes: Any) -> dict[str, Any]:
    """Three skills; the second is forgotten and half misrouted, the first becomes better."""
    first, second, third = names
    experts = {first: "one", second: "two", third: "one"}
    losses = ({first: 1.0}, {first: 0.9, second: 2.0}, {first: 0.75, second: 2.25, third: 0.8})
    accuracies = ({}, {second: 0.75}, {second: 0.5})
    routed = {first: {"one": 1.0}, second: {"one": 0.375, "two": 0.5}, third: {"one": 1.0}}
    figures = [
        StageFigures(
            skill=name,
            expert=experts[name],
            before=2.5,
            losses=losses[place],
            accuracies=accuracies[place],
            routed=routed,
            unsure={first: 0.0, second: 0.125, third: 0.0},
            general=3.25,
        )
        for place, name in enumerate(names)
    ]
    summary = summarise(figures, base_losses=dict.fromkeys(names, 3.0), base_general=3.0, experts=experts)
    decisions = [decision("one"), decision("two", kind="extend"), decision("one", kind="reuse")]
    stages = [
        {"name": stage.skill, "skill": stage.skill, "decision": decided, "figures": asdict(stage)}
        for stage, decided in zip(figures, decisions, strict=True)
    ]
    found = {"run": "poc", "base_model": "tiny", "stages": stages, "summary": asdict(summary)}
    return json.loads(json.dumps(found | changes))


def test_the_figures_are_told_with_their_meaning() -> None:
    text = Page(render_stream(record())).text
    for expected in (
        "Run poc, base tiny: 3 skills in a stream.",
        "1.267 nats a token: the loss after the last stage",
        "+0.050 nats a token: forgetting",
        " 0.000 nats a token: backward transfer",
        "+0.500 nats a token: forward transfer",
        "50.0%: right answers",
        "+25.0 points: forgetting",
        "-25.0 points: backward transfer",
        "83.3%: the prompts that went to the expert of their skill",
        "+0.250 nats a token: the change of the loss on general text",
    ):
        assert expected in text


def test_decisions_stand_in_order_with_their_numbers() -> None:
    text = Page(render_stream(record())).text
    first, second, third = (
        "code: a new skill, so a new expert, one. Nothing is like it.",
        "news: a known skill that its expert did badly, so two was trained further.",
        "code_2: a known skill, so one answers it as it is.",
    )
    assert -1 < text.find(first) < text.find(second) < text.find(third)
    assert "held out auroc 0.9877, rows 1,256, bound not measured" in text


def test_the_heat_map_shades_what_changed_since_it_was_learned() -> None:
    page = Page(render_stream(record()))
    *_, first, second, third = page.row("3", "code_2")
    assert [cell[0] for cell in (first, second, third)] == ["0.75", "2.25", "0.80"]
    assert "var(--bar) 25.0%" in first[1] and "darkorange 25.0%" in second[1]  # half of the full 0.5 nats, at most 50 %
    assert " 0.0%" in third[1] and "outline" in third[1] and "outline" not in second[1]
    assert [cell[0] for cell in page.row("1", "code")] == ["1", "code", "1.00", "", ""]
    answers = [row for row in page.rows if row[0][0] == "3"][1]
    assert answers[2][0] == "0.50" and "darkorange 50.0%" in answers[2][1]


def test_no_change_is_darker_than_the_full_colour() -> None:
    found = record()
    found["summary"]["loss"]["matrix"][2][1] = 99.0
    assert "darkorange 50.0%" in Page(render_stream(found)).row("3", "code_2")[3][1]


def test_misrouted_prompts_are_seen() -> None:
    page = Page(render_stream(record()))
    assert [cell[0] for cell in page.row("skill", "one")] == ["skill", "one", "two", "the base"]
    _, one, two, base = page.row("news", "37.5%")
    assert (two[0], base[0]) == ("50.0%", "12.5%")
    assert "outline" in two[1] and "outline" not in one[1]
    assert " 18.8%" in one[1] and " 25.0%" in two[1]


def test_a_change_by_hand_is_a_row_among_the_stages() -> None:
    found = record()
    change = {**found["stages"][1]["figures"], "skill": None, "expert": None, "before": None}
    merged = decision("one", kind="merge", reason="By hand.", numbers={})
    found["stages"].append({"name": "merge", "skill": None, "decision": merged, "figures": change})
    found["summary"]["loss"]["matrix"].append([0.75, 2.5, 0.8])
    found["summary"]["accuracy"]["matrix"].append([None, 0.25, None])
    page = Page(render_stream(found))
    assert "merge: experts merged into one. By hand." in page.text and "3 skills in a stream." in page.text
    assert [text for text, _ in page.row("4", "merge")] == ["4", "merge", "0.75", "2.50", "0.80"]
    assert not any("outline" in style for _, style in page.row("4", "merge"))


def test_one_skill_has_no_transfer_and_loss_only_no_answers() -> None:
    figures = StageFigures(
        skill="a", expert=None, before=2.0, losses={"a": 1.0}, accuracies={}, routed={}, unsure={}, general=None
    )
    summary = summarise([figures], base_losses={}, base_general=None, experts={})
    stages = [{"name": "a", "skill": "a", "decision": decision(None), "figures": asdict(figures)}]
    text = Page(render_stream(record(stages=stages, summary=asdict(summary)))).text
    assert "1 skill in a stream." in text and "so a new expert, no expert." in text
    for missing in ("forgetting", "backward transfer", "forward transfer", "the prompts that went", "the change"):
        assert f"not measured: {missing}" in text
    assert "Right answers" not in text and "points" not in text


def test_a_loss_that_is_no_number_is_shown_as_such() -> None:
    found = record()
    found["summary"]["loss"]["matrix"][2][1] = float("nan")
    found["summary"]["loss"]["forgetting"] = float("nan")
    page = Page(render_stream(found))
    assert page.row("3", "code_2")[3][0] == "nan" and "nan nats a token: forgetting" in page.text


@pytest.mark.parametrize(
    "bad", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "{0}{x}"]
)
def test_names_cannot_write_into_the_page(bad: str) -> None:
    found = record((bad, "b", "c"), run=bad, base_model=bad)
    for stage in found["stages"]:
        stage["decision"] |= {"kind": bad, "expert": bad, "reason": bad, "numbers": {bad: bad}}
    routing = found["summary"]["routing"]
    routing["experts"][0] = routing["served_by"][0] = bad
    page = Page(render_stream(found))
    assert not {"script", "img"} & page.tags
    assert page.text.count(bad) >= 15


def test_the_page_asks_for_nothing() -> None:
    assert not re.search(r"url\(|@import|https?://|src=|href=", render_stream(record()))


def test_a_record_that_lacks_a_part_is_no_page_with_gaps() -> None:
    broken = record()
    del broken["summary"]["loss"]["average"]
    with pytest.raises(UndefinedError, match="average"):
        render_stream(broken)
