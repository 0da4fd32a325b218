"""The page in a real browser, before the real server and a tiny mixture.

Skips, and says why, where playwright or a browser is missing.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.browser import FAULTS, browser
from tests.serve.conftest import Gate, Served
from tests.train.terminal import until

__all__ = ["browser"]

QUESTION = "Say red tulip."
PAGE = (resources.files("dylora_moe.serve") / "page.html").read_text(encoding="utf-8")


class Tab:
    """One page and what went wrong on it."""

    def __init__(self, browser: Any, url: str, *, expected: str = "nothing", **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        self.page, self.faults = self.context.new_page(), list[str]()
        add = self.faults.append
        self.page.on("console", lambda message: None if expected in message.text else add(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: add(f"error: {error}"))
        self.page.on("request", lambda asked: None if asked.url.startswith(url) else add(f"asks: {asked.url}"))
        self.page.goto(url)

    def ask(self, question: str = QUESTION, *, tokens: int | str = 12, wait: bool = True) -> None:
        """Type a question and press Enter."""
        self.until("document.getElementById('model').value !== ''")
        self.page.evaluate("tokens => { document.getElementById('longest').value = tokens; }", tokens)
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the answers are complete."""
        self.until("document.getElementById('send').textContent === 'Send'")

    def until(self, expression: str) -> None:
        """Until it is true; playwright's own waiting evaluates text in the page, which the page's policy forbids."""
        end = time.monotonic() + 60
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"{expression} did not come true; {self.faults}"
            self.page.wait_for_timeout(20)

    def tokens(self, answer: int = -1) -> list[dict[str, Any]]:
        """Text, expert and ground of each token of an answer."""
        return (
            self.page.locator(".answer")
            .all()[answer]
            .evaluate(
                "e => [...e.querySelectorAll('.token')].map(t => ({token: t.textContent, expert: t.dataset.expert, "
                "ground: getComputedStyle(t).getPropertyValue('--s') + getComputedStyle(t).backgroundColor}))"
            )
        )

    def text(self, answer: int = -1) -> str:
        return str(self.page.locator(".answer .text").all()[answer].evaluate("e => e.textContent"))


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Callable[..., Tab]]:
    """(url, **options) -> a tab, in which nothing may have gone wrong by the end."""
    tabs: list[Tab] = []

    def start(url: str, **options: Any) -> Tab:
        tabs.append(Tab(browser, url, **options))
        return tabs[-1]

    yield start
    faults = [fault for tab in tabs for fault in tab.faults]
    for tab in tabs:
        tab.context.close()
    assert faults == []


@pytest.fixture
def served(start_server: Callable[..., Served], make_mixture: Callable[..., Any]) -> Served:
    return start_server(make_mixture())


def routed(served: Served, model: str, messages: list[Any] | None = None, tokens: int = 12) -> tuple[str, list[Any]]:
    """What `/v1` says: the text, and the routing of each token that has some."""
    answer = served.client().chat.completions.create(
        model=model,
        messages=messages or [{"role": "user", "content": QUESTION}],
        max_tokens=tokens,
        temperature=0,
        extra_body={"routing": True},
    )
    choice = answer.choices[0].model_dump()
    return choice["message"]["content"], [each for each in choice["routing"] if each["token"]]


def best(experts: dict[str, float]) -> str:
    return max(experts, key=lambda name: experts[name]) if experts else ""


def test_tints_cards_and_bars_are_those_of_the_routing(served: Served, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(served.url)
    tab.ask()
    text, routing = routed(served, "tiny")
    assert tab.text() == text
    tokens = tab.tokens()
    assert [(each["token"], each["expert"]) for each in tokens] == [
        (each["token"], best(each["experts"])) for each in routing
    ]
    legend = tab.page.locator("#legend li").evaluate_all(
        "all => Object.fromEntries(all.map(e => [e.textContent, getComputedStyle(e).getPropertyValue('--s') + "
        "getComputedStyle(e).backgroundColor]))"
    )
    assert len(set(legend.values())) == 5 and {each["expert"] for each in tokens} <= set(legend)
    assert all(each["ground"] == legend[each["expert"]] for each in tokens)
    tab.page.locator(".token").nth(2).hover()
    card = tab.page.locator("#card").inner_text()
    for name, weight in routing[2]["experts"].items():
        assert name in card and f"{round(weight * 100)} %" in card
    tab.page.mouse.move(0, 0)
    assert not tab.page.locator("#card").is_visible()
    bars = tab.page.locator(".answer .fill").evaluate_all("all => all.map(e => [e.dataset.expert, e.style.width])")
    whole = {each["expert"] for each in tokens}
    assert {name for name, _ in bars} == whole and sum(float(width[:-1]) for _, width in bars) == pytest.approx(
        100, abs=1
    )


def test_experts_the_base_and_what_was_said_before(served: Served, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(served.url)
    tab.page.select_option("#model", "expert_2")
    tab.ask()
    first, _ = routed(served, "expert_2")
    assert tab.text() == first and {each["expert"] for each in tab.tokens()} == {"expert_2"}
    tab.page.click("summary")
    tab.page.fill("#system", "Be brief.")
    tab.page.select_option("#model", "base")
    tab.ask("And again?")
    messages = [("system", "Be brief."), ("user", QUESTION), ("assistant", first), ("user", "And again?")]
    second, _ = routed(served, "base", [{"role": role, "content": content} for role, content in messages])
    assert tab.text() == second and {each["expert"] for each in tab.tokens()} == {""}
    tab.page.click("#fresh")
    assert tab.page.locator(".answer").count() == 0
    tab.page.fill("#system", "")
    tab.page.select_option("#model", "expert_2")
    tab.ask()
    assert tab.text() == first


@pytest.mark.parametrize("how", ["button", "escape"])
def test_an_answer_streams_and_stops(
    served: Served, open_tab: Callable[..., Tab], make_gate: Callable[[Any], Gate], how: str
) -> None:
    gate = make_gate(served.engine.model)
    tab = open_tab(served.url)
    tab.ask(tokens=180, wait=False)
    gate.allow(20)
    tab.until("document.querySelectorAll('.token').length > 2")
    early = len(tab.tokens())
    gate.allow(20)
    tab.until(f"document.querySelectorAll('.token').length > {early}")
    assert tab.page.locator("#send").inner_text() == "Stop" and tab.page.locator(".fill").count()
    tab.page.click("#send") if how == "button" else tab.page.keyboard.press("Escape")
    tab.wait()
    assert "Stopped." in tab.page.locator(".answer").inner_text() and early <= len(tab.tokens()) <= 40
    until(lambda: served.answers.under_way == 0)
    gate.allow(5)
    until(lambda: served.engine.snapshot().rows == 0)
    gate.open()
    tab.ask("Once more.")
    assert tab.text()


def test_a_comparison_has_three_columns_or_three_rows(served: Served, open_tab: Callable[..., Tab]) -> None:
    for width, columns in ((1280, 3), (360, 1)):
        tab = open_tab(served.url, viewport={"width": width, "height": 900})
        tab.page.check("#comparing")
        tab.page.select_option("#beside", "expert_3")
        tab.ask()
        names = ["base", "tiny", "expert_3"]
        assert tab.page.locator(".answer h2").all_inner_texts() == names
        assert [tab.text(place) for place in range(3)] == [routed(served, name)[0] for name in names]
        left = tab.page.locator(".answer").evaluate_all("all => all.map(e => e.getBoundingClientRect().left)")
        assert len(set(left)) == columns


def test_keys_of_the_keyboard(served: Served, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(served.url)
    tab.page.fill("#question", "one")
    tab.page.press("#question", "Shift+Enter")
    tab.page.keyboard.type("two")
    assert tab.page.input_value("#question") == "one\ntwo" and tab.page.locator(".answer").count() == 0
    tab.ask()
    assert tab.page.locator("#say").inner_text().startswith("tiny: ")
    tab.page.locator(".answer .text").focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowRight")
    assert tab.page.locator(".token.at").evaluate("e => [...e.parentElement.children].indexOf(e)") == 1
    assert tab.page.locator("#card").is_visible()
    tab.page.keyboard.press("Escape")
    assert not tab.page.locator("#card").is_visible()


def test_arrows_go_through_an_answer_that_is_longer_than_the_screen(
    served: Served, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab(served.url, viewport={"width": 360, "height": 480})
    tab.ask(tokens=110)
    tab.page.evaluate("scrollTo(0, 0)")
    tab.page.locator(".answer .text").evaluate("e => e.focus({preventScroll: true})")
    number, seen = len(tab.tokens()), "e => e.getBoundingClientRect().bottom <= write.getBoundingClientRect().top"
    for index in range(number):
        tab.page.keyboard.press("ArrowRight")
        tab.page.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
        token = tab.page.locator(".token.at")
        assert token.evaluate("e => [...e.parentElement.children].indexOf(e)") == index
        assert token.evaluate(seen) and tab.page.locator("#card").is_visible()
    assert tab.page.evaluate("scrollY > 200")


def test_the_key_is_asked_for_and_kept_in_memory_only(
    start_server: Callable[..., Served], make_mixture: Callable[..., Any], open_tab: Callable[..., Tab]
) -> None:
    served = start_server(make_mixture(), key="sesame")
    tab = open_tab(served.url, expected="status of 401")
    for key in ("wrong", "sesame"):
        tab.page.wait_for_selector("#door[open]")
        tab.until(
            f"document.getElementById('asks').textContent.startsWith('That was not') === {json.dumps(key == 'sesame')}"
        )
        tab.page.fill("#key", key)
        tab.page.press("#key", "Enter")
    tab.page.wait_for_selector("#model option", state="attached")
    tab.ask()
    assert tab.text()
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    assert "sesame" not in tab.page.evaluate(kept) and "sesame" not in tab.page.content()
    tab.page.reload()
    tab.page.wait_for_selector("#door[open]")
    tab.page.click("#shut")
    assert "wants its key" in tab.page.locator(".wrong").inner_text()


def test_what_goes_wrong_is_told_in_words(served: Served, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(served.url, expected="Failed to load resource")
    tab.ask(tokens=5000)
    assert "at most 200" in tab.page.locator(".wrong").inner_text()
    assert tab.page.input_value("#question") == QUESTION  # to be asked again
    tab.page.route("**/v1/chat/completions", lambda route: route.abort())
    tab.ask()
    assert "cannot be reached" in tab.page.locator(".wrong").all()[-1].inner_text()


def test_what_a_model_writes_is_text(served: Served, open_tab: Callable[..., Tab]) -> None:
    tab, hostile = open_tab(served.url), "<img src=x onerror=alert(1)><script>alert(2)</script>"
    chunk = {
        "delta": {"content": hostile},
        "routing": [{"token": hostile, "experts": {"<b>x": 1}}],
        "finish_reason": "stop",
    }
    body = f"data: {json.dumps({'choices': [{'index': 0, **chunk}]})}\n\ndata: [DONE]\n\n"
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    tab.ask(hostile)
    tab.page.locator(".token").hover()
    assert tab.text() == hostile and "<b>x" in tab.page.locator("#card").inner_text()
    assert tab.page.locator("img, main b, main script").count() == 0


def test_an_answer_of_another_server_is_tinted_whole(served: Served, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(served.url)
    chunks = [{"delta": {"content": text}, "finish_reason": end} for text, end in (("one", None), (" two", "stop"))]
    body = "".join(f"data: {json.dumps({'choices': [{'index': 0, **chunk}]})}\n\n" for chunk in chunks)
    headers = {"X-DyLoRA-Model": "expert_1", "Content-Type": "text/event-stream"}
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, headers=headers))
    tab.ask()
    assert tab.text() == "one two" and {each["expert"] for each in tab.tokens()} == {"expert_1"}


def test_a_tap_shows_a_card_and_no_limit_means_all_that_there_is_room_for(
    served: Served, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab(served.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    tab.ask(tokens="")
    assert len(tab.tokens()) > 100  # of 200 that this server gives, those that are no half characters
    assert "Cut at the longest answer." in tab.page.locator(".answer").inner_text()
    token = tab.page.locator(".token").last
    token.tap()
    assert tab.page.locator("#card").is_visible() and not tab.page.locator(".keys").is_visible()
    token.tap()
    assert not tab.page.locator("#card").is_visible()
    token.tap()
    tab.page.locator("h1").tap()
    assert not tab.page.locator("#card").is_visible()


def test_the_page_is_whole_at_two_widths_light_and_dark(
    served: Served, open_tab: Callable[..., Tab], tmp_path: Path
) -> None:
    for width in (1280, 360):
        for scheme in ("light", "dark"):
            tab = open_tab(served.url, viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab.ask("A question with_a_word_that_is_longer_than_any_phone_is_wide_and_has_no_place_to_break.")
            tab.page.check("#comparing")
            tab.ask()
            tab.page.click("summary")
            tab.page.locator(".token").first.hover()
            faults = tab.page.evaluate(FAULTS.replace('text")', 'text, .token, label, button, option, #legend li")'))
            tab.page.screenshot(path=tmp_path / f"page-{width}-{scheme}.png", full_page=True)
            assert [fault for fault in faults if "hides text" not in fault] == []
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_script_that_the_page_does_not_have_cannot_run(served: Served, open_tab: Callable[..., Tab]) -> None:
    policy = requests.get(served.url, timeout=20).headers["content-security-policy"]
    scripts = re.search(r"script-src ([^;]*)", policy)
    assert scripts is not None and re.fullmatch(r"'sha256-[\w+/]{43}='", scripts[1])
    tab = open_tab(served.url, expected="violates the following Content Security Policy")
    tab.page.evaluate(
        "() => document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))"
    )
    assert tab.page.evaluate("window.bad === undefined")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", PAGE)
