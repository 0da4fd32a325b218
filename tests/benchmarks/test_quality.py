"""benchmarks/quality.py: rows of three sides that share nothing, figures of rows, and the tables of the docs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
RESULT = ROOT / "benchmarks" / "results" / "quality.json"


@pytest.fixture(scope="module")
def quality(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("quality")


def rows(losses: list[float], domain: str = "maths") -> list[dict[str, Any]]:
    return [
        {"domain": domain, "row": str(place), "nll": loss, "tokens": 2, "right": 1, "bytes": 9}
        for place, loss in enumerate(losses)
    ]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside the repository")
def test_the_sides_of_a_domain_share_no_prompt(quality: ModuleType, tmp_path: Path) -> None:
    sizes = {"train": 30, "validation": 8, "test": 20}
    found = quality.prepare(SHARED, tmp_path, train_rows=30, validation_rows=8, test_rows=20)
    assert list(found) == list(quality.DOMAINS)
    for folder in found.values():
        sides = {
            side: {json.loads(line)["prompt"] for line in (folder / f"{side}.jsonl").read_text().splitlines()}
            for side in sizes
        }
        assert {side: len(prompts) for side, prompts in sides.items()} == sizes
        assert len(set.union(*sides.values())) == sum(sizes.values())
    again = quality.prepare(SHARED, tmp_path / "again", train_rows=30, validation_rows=8, test_rows=20)
    assert (again["sql"] / "test.jsonl").read_bytes() == (found["sql"] / "test.jsonl").read_bytes()


def test_figures_are_means_over_domains_and_seeds(quality: ModuleType) -> None:
    first, second = rows([2.0, 4.0]) + rows([1.0], "sql"), rows([4.0, 4.0]) + rows([3.0], "sql")
    found = quality.figures([first, second])
    assert found["loss"] == {"maths": 1.75, "sql": 1.0} and found["accuracy"] == {"maths": 0.5, "sql": 0.5}
    assert found["mean_loss_by_seed"] == [1.0, 1.75] and found["mean_loss"] == 1.375


def test_rows_are_averaged_over_seeds_before_they_are_compared(quality: ModuleType) -> None:
    found = quality.compare([rows([1.0, 2.0]), rows([3.0, 2.0])], [rows([2.0, 3.0]), rows([4.0, 3.0])])
    assert found["maths"]["difference"] == found["mean"]["difference"] == pytest.approx(-0.5)
    both = [rows([1.0, 2.0]) + rows([1.0] * 4, "sql")], [rows([2.0, 3.0]) + rows([1.0] * 4, "sql")]
    assert quality.compare(*both)["mean"]["difference"] == pytest.approx(-0.25), "each domain counts alike"


def test_p_is_made_larger_for_all_cells_of_the_table(quality: ModuleType) -> None:
    cell = {"difference": 0.0, "interval": None, "p": 0.01}
    found = quality._adjusted({pair: {domain: dict(cell) for domain in "abc"} for pair in ("x", "y")})
    assert found["y"]["c"]["p_holm"] == pytest.approx(0.06)


@pytest.mark.skipif(not RESULT.is_file(), reason="the benchmark has no result yet")
def test_the_docs_have_the_tables_of_the_result(quality: ModuleType) -> None:
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    for table in (quality.rates_table, quality.losses_table, quality.differences_table):
        assert table(record) in text
