"""benchmarks/loader.py: its lengths, its layouts, and a quick run from end to end."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner


@pytest.fixture(scope="module")
def loader(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("loader")


def test_lengths_have_the_recorded_quantiles(loader: ModuleType) -> None:
    lengths = sorted(loader.draw_lengths("code_alpaca", 4001, seed=0))
    assert lengths[2000] == pytest.approx(loader.QUANTILES[25], rel=0.05)
    assert loader.QUANTILES[0] <= lengths[0] and lengths[-1] <= loader.QUANTILES[-1]
    assert list(loader.QUANTILES) == sorted(loader.QUANTILES)
    lognormal = loader.draw_lengths("lognormal", 4000, seed=0)
    assert sum(lognormal) / len(lognormal) == pytest.approx(174, rel=0.05)


def test_a_row_has_a_prompt_and_an_answer(loader: ModuleType) -> None:
    (row,) = loader.make_rows([10], 50, seed=0)
    assert row.labels[:4] == (-100,) * 4 and row.labels[4:] == row.input_ids[4:]


def test_a_quick_run_writes_its_figures(loader: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "figures" / "loader.json"
    arguments = ["--num-rows", "64", "--max-length", "128", "--shape", "tiny", "--layers", "1", "--round-tokens", "1"]
    done = CliRunner().invoke(loader.main, [*arguments, "--rounds", "1", "--output", str(output)])
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    layouts = {layout["name"]: layout for layout in record["layouts"]}
    assert layouts["random, 8 rows"]["times_random"] == pytest.approx(1)
    assert layouts["one row"]["fill_rate"] == layouts["packs of 256"]["fill_rate"] == 1
    assert layouts["random, 8 rows"]["fill_rate"] < layouts["bucketed, 8 rows, pools of 8"]["fill_rate"] < 1
    assert all(layout["loader_tokens_per_s"] > 0 and layout["step_tokens_per_s"] > 0 for layout in layouts.values())
    assert record["settings"]["seed"] == 0 and record["lengths"]["longest"] <= 128
