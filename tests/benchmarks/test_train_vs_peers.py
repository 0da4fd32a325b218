"""benchmarks/train_vs_peers.py: both libraries train for real on the same rows, and unequal work voids the figures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.tiny import tiny_base

__all__ = ["tiny_base"]


@pytest.fixture(scope="module")
def peers(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("train_vs_peers")


@pytest.fixture(scope="module")
def rows(peers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    source = tmp_path_factory.mktemp("source") / "alpaca.json"
    texts = [{"instruction": f"Say {number}", "input": "river", "output": f"{number} blue"} for number in range(40)]
    texts += [{"instruction": "Say nothing", "input": "", "output": " "}, {**texts[0], "output": "x" * 500}]
    source.write_text(json.dumps(texts), encoding="utf-8")
    peers.write_rows(source, folder, rows=24, validation=4, longest=100, seed=0)
    return folder


def test_rows_are_whole_and_on_one_side_each(rows: Path) -> None:
    sides = [
        [json.loads(line)["prompt"] for line in (rows / f"{side}.jsonl").read_text().splitlines()]
        for side in ("train", "validation")
    ]
    assert [len(side) for side in sides] == [24, 4] and len({*sides[0], *sides[1]}) == 28
    assert all(prompt.endswith("\nriver") for side in sides for prompt in side)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["ours", "trl"])
def test_a_library_trains_until_it_has_read_enough(
    peers: ModuleType, rows: Path, tiny_base: Path, tmp_path: Path, library: str
) -> None:
    if library == "trl":
        pytest.importorskip("trl", reason="TRL is not installed")
    settings = {"num_experts": 2} if library == "ours" else peers.CONTENDERS[peers.TUNED][1]
    job = peers.Job(
        base=str(tiny_base), folder=str(rows), work=str(tmp_path / "run"), library=library, settings=settings, batch=4
    )
    found = peers.in_a_process_of_its_own(replace(job, tokens=1), 1)
    assert found["steps"] == 2, "the first is not timed"
    found = peers.in_a_process_of_its_own(replace(job, tokens=150, work=str(tmp_path / "more")), 1)
    assert found["steps"] > 1 and found["all_tokens"] >= 150 > found["all_tokens"] * (1 - 2 / found["steps"])
    assert 0 < found["tokens"] < found["all_tokens"] and 0 <= found["filled_share"] < 1
    assert found["cpu_s"] > 0 and found["peak_bytes"] > 1e8 and 0 < found["loss"] < 20
    assert 0 < found["roof_share"] < 1


def figures(peers: ModuleType, **changes: Any) -> dict[str, list[dict[str, Any]]]:
    line = {"tokens_per_s": 1.0, "filled_share": 0.1, "roof_share": 0.5, "loss": 1.0, "all_tokens": 6000, "steps": 6}
    rates = {peers.DEFAULTS: 10.0, peers.TUNED: 20.0, peers.PACKED: 22.0, peers.ONE: 30.0, peers.EIGHT: 29.0}
    found = {name: [line | {"tokens_per_cpu_s": rate * noise} for noise in (1, 2)] for name, rate in rates.items()}
    found[peers.EIGHT] = [each | changes for each in found[peers.EIGHT]]
    return found


def test_ratios_are_of_one_round(peers: ModuleType) -> None:
    runs = figures(peers)
    summed = peers.summary(runs, {name: 10**9 for name in runs})
    assert summed[peers.ONE]["times_as_fast_as"] == {peers.DEFAULTS: 3.0, peers.TUNED: 1.5, peers.PACKED: 30 / 22}
    assert peers.check(summed) == []


@pytest.mark.parametrize("changes", [{"all_tokens": 9000}, {"loss": 1.3}])
def test_unequal_work_voids(peers: ModuleType, changes: dict[str, Any]) -> None:
    runs = figures(peers, **changes)
    assert len(peers.check(peers.summary(runs, {name: 1 for name in runs}))) == 1
