"""The pages in a real browser, at a desk and on a phone, light, dark and printed: quiet, whole, and readable.

Skips, and says why, where playwright or a browser is missing.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.browser import FAULTS, browser
from tests.report.measured import write

from dylora_moe.evaluate.stream import read_stream
from dylora_moe.report.compare import render_comparison
from dylora_moe.report.records import read_run
from dylora_moe.report.run import render_run
from dylora_moe.run_dir import RunDir

__all__ = ["browser"]

_LONG = "a_domain_whose_name_is_longer_than_any_phone_is_wide_and_has_no_place_to_break"


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Callable[..., list[str]]:
    """(page, width, scheme, printed) -> its faults; a screenshot of it lies in the test's folder."""

    def look(page: Path, *, width: int, scheme: str = "light", printed: bool = False) -> list[str]:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab, faults = context.new_page(), list[str]()
        tab.on("console", lambda message: faults.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: faults.append(f"error: {error}"))
        tab.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
        tab.on(
            "request", lambda request: None if request.url == page.as_uri() else faults.append(f"asks: {request.url}")
        )
        tab.goto(page.as_uri())
        if printed:
            tab.emulate_media(media="print")
        else:
            tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        faults += tab.evaluate(FAULTS)
        tab.screenshot(path=tmp_path / f"{page.stem}-{width}-{'print' if printed else scheme}.png", full_page=True)
        context.close()
        return faults

    return look


def write_page(run: Path) -> Path:
    began = time.monotonic()
    record = read_run(run)
    stream = read_stream(RunDir(run)) if record.is_stream and not record.result else None
    page = run.parent / f"{run.name}.html"
    page.write_text(render_run(record, stream), encoding="utf-8")
    assert time.monotonic() - began < 5 and page.stat().st_size < 2_000_000
    return page


def renamed(run: Path, name: str, new: str) -> None:
    for path in [*run.rglob("*.json"), *run.rglob("*.jsonl"), run / "config.yaml"]:
        path.write_text(path.read_text().replace(name, new))


@pytest.mark.parametrize("name", ["joint", "stream"])
def test_a_page_is_whole_and_quiet(
    run_of: Callable[..., Path], open_page: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    page = write_page(run_of(name, measured=name == "joint"))
    for width in (1280, 360):
        for scheme in ("light", "dark"):
            assert open_page(page, width=width, scheme=scheme) == []
    assert open_page(page, width=820) == [] and open_page(page, width=718, printed=True) == []
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_long_names_and_many_experts_break_no_page(
    run_of: Callable[..., Path], open_page: Callable[..., list[str]]
) -> None:
    run = run_of("joint", measured=True)
    renamed(run, "sums", _LONG)
    renamed(run, "expert_1", f"expert_{_LONG}")
    names = [f"expert {place}" for place in range(24)]
    write(run, "similarity", {"experts": names, "similarity": [[0.5] * 24] * 24})
    page = write_page(run)
    assert open_page(page, width=1280) == [] and open_page(page, width=360, scheme="dark") == []


def test_a_run_under_way_and_several_runs_are_whole(
    run_of: Callable[..., Path], open_page: Callable[..., list[str]], tmp_path: Path
) -> None:
    joint, stream, going = run_of("joint", measured=True), run_of("stream"), run_of("joint", "going")
    (going / "result.json").unlink()
    lines = (going / "metrics.jsonl").read_text()
    (going / "metrics.jsonl").write_text(lines[: len(lines) // 2])
    assert open_page(write_page(going), width=360) == []
    page = tmp_path / "compare.html"
    page.write_text(
        render_comparison([read_run(path) for path in (joint, stream, going)], [None] * 3), encoding="utf-8"
    )
    for width in (1280, 360):
        for scheme in ("light", "dark"):
            assert open_page(page, width=width, scheme=scheme) == []
    assert open_page(page, width=718, printed=True) == []


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("<p style='width: 500px'>wide</p>", "the page is"),
        ("<p style='color: #aaa; background: #fff'>pale</p>", "has contrast"),
        ("<p style='overflow: hidden; width: 20px; white-space: nowrap'>all of this</p>", "hides text"),
        ("<script>alert(1)</script>", "console:"),
        ("<img src='https://example.org/x.png'>", "console:"),
        (
            "<svg class='chart' viewBox='0 0 40 40' style='max-width: 40px'><text x='30' y='20'>words</text></svg>",
            "is cut",
        ),
    ],
)
def test_what_is_broken_is_found(
    run_of: Callable[..., Path], open_page: Callable[..., list[str]], broken: str, fault: str
) -> None:
    page = write_page(run_of("single"))
    page.write_text(page.read_text(encoding="utf-8").replace("<h1>", f"{broken}<h1>"), encoding="utf-8")
    assert any(fault in found for found in open_page(page, width=360))
