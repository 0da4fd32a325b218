"""benchmarks/loss.py: three ways to one loss, and what each of them holds."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner


@pytest.fixture(scope="module")
def loss(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("loss")


@pytest.mark.slow
def test_all_give_the_same_loss_and_gradient(loss: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    arguments = ["--vocabulary", "20000", "--features", "32", "--tokens", "256", "--repeats", "1", "--out", str(out)]
    done = CliRunner().invoke(loss.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [case["labelled"] for case in report["cases"]] == [1.0, 0.5] and len(report["bars"]) == 2
    for case in report["cases"]:
        for line in case["losses"].values():
            assert line["loss_off"] < 1e-5 and line["gradient_off"] < 1e-5
        # Logits in float32 are 20 MB, and their gradient as much: what is measured is at least these.
        assert case["losses"]["full logits"]["peak_bytes"] > 256 * 20_000 * 4


def test_half_the_labels_are_half_the_work(loss: ModuleType) -> None:
    case = loss.Case(tokens=8, features=4, vocabulary=10, labelled=0.5, device="cpu", seed=0)
    assert (case.labels != -100).sum().item() == 4 and (case.labels[:, :2] == -100).all()
