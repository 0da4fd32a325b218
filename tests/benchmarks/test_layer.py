"""benchmarks/layer.py: it runs and writes what it says, and its self-check can fail. No figure is judged here."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner


@pytest.fixture(scope="module")
def layer(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("layer")


@pytest.fixture(scope="module")
def report(layer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a quick run wrote."""
    out = tmp_path_factory.mktemp("layer") / "layer.json"
    done = CliRunner().invoke(layer.main, ["--quick", "--device", "cpu", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "N=2, top 1, token, grouped (auto)" in done.output
    return json.loads(out.read_text(encoding="utf-8"))


def test_report_says_what_was_measured_where(report: dict[str, Any]) -> None:
    environment = report["environment"]
    for key in ("date", "python", "torch", "transformers", "peft", "cpu", "device"):
        assert environment[key]
    assert environment["threads"] == 1
    assert {"dylora_moe_revision", "uncommitted_changes", "load_average", "load_average_at_end"} <= set(environment)
    assert report["settings"]["quick"] is True
    assert report["valid"] is None, "a quick run proves nothing"


def test_every_execution_is_timed_on_every_decision(report: dict[str, Any]) -> None:
    (result,) = report["results"]
    expected = {"token": {"bottleneck", "grouped"}, "sequence": {"bottleneck", "grouped", "rowwise"}}
    contests = result["contests"]
    assert len(contests) == 2 * 2 * 2
    for contest in contests:
        assert set(contest["ratios"]) == expected[contest["granularity"]]
        assert contest["auto"] in contest["ratios"] and contest["fastest"] in contest["ratios"]
    for record in result["layers"]:
        assert record["seconds"][0] > 0 and record["operations"] > 10
        assert record["forward_s"] > 0 and record["backward_s"] > 0
    assert [record["execution"] for record in result["layers"]].count("peft") == 2


def test_saved_bytes_are_of_the_ranks_size(report: dict[str, Any]) -> None:
    """Neither the input nor anything gathered is among them; 64 tokens of rank 8."""
    (result,) = report["results"]
    found = {(r["execution"], r["granularity"], r["top_k"], r["experts"]): r["saved_bytes"] for r in result["layers"]}
    one = 64 * 8 * 4
    assert found["peft", None, 1, 1] == one
    for experts in (2, 4):
        assert found["grouped", "token", 1, experts] <= one + 64
        assert found["grouped", "token", 2, experts] <= 2 * one + 64


def test_a_count_of_operations_does_not_grow_with_the_experts(report: dict[str, Any]) -> None:
    (result,) = report["results"]
    for execution in ("bottleneck", "grouped"):
        counts = {r["experts"]: r["operations"] for r in result["layers"] if r["execution"] == execution}
        assert counts[2] == counts[4], execution


def test_figures_that_differ_for_the_same_layer_void_a_run(
    layer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = {"valid": False, "layers": [], "features": [1, 1], "shape": "gemma-up", "rank": 8}
    result |= {"rows": 8, "tokens": 128, "again": 1.2}
    monkeypatch.setattr(layer, "measure", lambda *args: dict(result))
    out = tmp_path / "layer.json"
    done = CliRunner().invoke(
        layer.main, ["--shapes", "gemma-up", "--ranks", "8", "--device", "cpu", "--out", str(out)]
    )
    assert done.exit_code == 2 and "VOID" in done.output
    assert json.loads(out.read_text(encoding="utf-8"))["valid"] is False


@pytest.mark.parametrize(("again", "expected"), [(0.9, False), (0.95, True), (1.05, True), (1.1, False)])
def test_a_second_layer_takes_the_time_of_the_first(layer: ModuleType, again: float, expected: bool) -> None:
    assert layer.is_sound(again) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_triton_is_timed_on_a_gpu(layer: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "layer.json"
    done = CliRunner().invoke(layer.main, ["--quick", "--device", "cuda", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (result,) = json.loads(out.read_text(encoding="utf-8"))["results"]
    launches = {(r["top_k"], r["triton_launches"]) for r in result["layers"] if r["execution"] == "triton"}
    assert launches == {(1, 6), (2, 8)}


@pytest.mark.parametrize(
    "arguments", [["--shapes", "huge"], ["--experts", "1,x"], ["--ranks", "0"], ["--repeats", "0"]]
)
def test_wrong_options_are_refused(layer: ModuleType, arguments: list[str]) -> None:
    assert CliRunner().invoke(layer.main, arguments).exit_code == 2
