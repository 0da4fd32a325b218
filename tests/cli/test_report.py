"""`dylora report`: where the page goes, what it does not write over, what it prints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Path:
    """The records of a run that a real command trained, in the test's own folder."""
    target = tmp_path / "mine"
    shutil.copytree(finished.folder, target, ignore=shutil.ignore_patterns("checkpoints", "final"))
    return target


def test_the_page_goes_into_the_run(dylora: Callable[..., Any], run: Path) -> None:
    began = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(began | {"command": ["bin/dylora", *began["command"][1:]]}))
    outcome = dylora("report", run, "--json")
    told = outcome.json()
    page = run / "report.html"
    assert told.keys() == {"report", "bytes", "seconds"} and told["report"] == str(page)
    assert told["bytes"] == page.stat().st_size < 2_000_000 and 0 < told["seconds"] < 5
    assert f"Report: {page}" in outcome.err
    text = page.read_text(encoding="utf-8")
    assert "three-domains.yaml --max_steps 5 --lora-alpha 16 --json</pre>" in text
    page.write_text("an older page")
    assert dylora("report", run).code == 0 and page.read_text(encoding="utf-8").count("<h1>mine</h1>") == 1


def test_several_go_into_the_first(dylora: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, other := tmp_path / "other")
    told = dylora("report", run, other, "--json").json()
    assert told["report"] == str(run / "report-compare.html")
    assert "<h1>mine and other</h1>" in (run / "report-compare.html").read_text(encoding="utf-8")
    assert not (run / "report.html").exists() and not (other / "report.html").exists()


def test_elsewhere_only_a_report_is_written_over(dylora: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        assert dylora("report", run, "--output", page).code == 0
    assert "<h1>mine</h1>" in page.read_text(encoding="utf-8") and not (run / "report.html").exists()
    page.write_text("<p>My own notes, by dylora report</p>")
    outcome = dylora("report", run, "--output", page)
    assert outcome.code == 2 and "must be a new file or a report" in outcome.err
    assert page.read_text() == "<p>My own notes, by dylora report</p>"
    assert "got the folder" in dylora("report", run, "--output", tmp_path).err
    assert "must be in a folder that is there" in dylora("report", run, "--output", tmp_path / "no" / "page.html").err


def test_what_is_no_run_is_told(dylora: Callable[..., Any], tmp_path: Path) -> None:
    outcome = dylora("report", tmp_path)
    assert outcome.code == 1 and "which has a config.yaml" in outcome.err and not list(tmp_path.iterdir())
    assert dylora("report").code == 2


def test_half_a_character_does_not_stop_it(dylora: Callable[..., Any], run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    result["samples"][0]["after"]["text"] = "half \ud83d of a pair"
    (run / "result.json").write_text(json.dumps(result))
    assert dylora("report", run).code == 0
    assert "half \\ud83d of a pair" in (run / "report.html").read_text(encoding="utf-8")


def test_a_page_of_made_data_is_that_of_generate(dylora: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("generator: x\nquestions: [a]\n")
    outcome = dylora("report", tmp_path)
    assert outcome.code == 1 and "must hold the result of `dylora generate`" in outcome.err
