"""docs/performance.md has the figures of benchmarks/results, and no others."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import pytest


@pytest.fixture(scope="module")
def performance(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("performance")


def test_the_page_is_that_of_the_files(performance: ModuleType) -> None:
    page: Path = performance.PAGE
    assert performance.filled(page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8")
    assert performance.picture() + "\n" == performance.PICTURE.read_text(encoding="utf-8")


def test_another_figure_shows(performance: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page, read = performance.PAGE.read_text(encoding="utf-8"), performance.read

    def other(name: str) -> object:
        found = read(name)
        if name == "loss":
            found["cases"][0]["losses"]["ours"]["ratio"] = 0.123
        return found

    monkeypatch.setattr(performance, "read", other)
    assert "0.123" in performance.filled(page) and performance.filled(page) != page


def test_a_block_that_is_not_there_is_told(performance: ModuleType) -> None:
    with pytest.raises(click.ClickException, match="one block step"):
        performance.filled("# A page without blocks\n")
