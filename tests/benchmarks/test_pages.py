"""README.md and docs/paper.md have the figures of benchmarks/results, and the paper speaks of each file there."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def pages(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("pages")


def test_tables_and_pictures_are_those_of_the_files(pages: ModuleType) -> None:
    for page, blocks in pages.BLOCKS.items():
        text = page.read_text(encoding="utf-8")
        assert pages.filled(text, blocks, page.name) == text, f"run python benchmarks/pages.py: {page.name} has others"
    for path, draw in pages.PICTURES.items():
        assert draw() + "\n" == path.read_text(encoding="utf-8")


def test_another_figure_shows(pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    read = pages.performance.read

    def other(name: str) -> object:
        found = read(name)
        if name == "step-tiny-64":
            found["shapes"][0]["contenders"][0]["ratio"]["paired"] = 9.87
            for each in found["shapes"][0]["contenders"]:
                if each["name"] == "DyLoRA-MoE, N=8, sequence":
                    each["ratio"]["paired"] = 7.77
        return found

    monkeypatch.setattr(pages.performance, "read", other)
    for page, blocks in pages.BLOCKS.items():
        assert "7.77" in pages.filled(page.read_text(encoding="utf-8"), blocks, page.name)


def test_the_paper_names_each_file_of_results(pages: ModuleType) -> None:
    text = pages.PAPER.read_text(encoding="utf-8")
    files = [path.name for path in RESULTS.glob("*.json")]
    assert files and [name for name in files if name not in text] == []
