"""benchmarks/olora.py: orthogonal LoRAs keep the old ones, and are driven away from them. No figure is judged here."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.tiny import lean_process, tiny_base, tiny_rows

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["lean_process", "tiny_base", "tiny_rows"]


@pytest.fixture(scope="module")
def olora(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("olora")


@pytest.fixture
def lab(olora: ModuleType, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> Any:
    tasks = tuple(
        olora.Task(name=name, train=path, test=olora._read(path)[:3]) for name, path in list(tiny_rows.items())[:2]
    )
    settings = {"base_model": str(tiny_base), "output_dir": str(tmp_path), "max_length": 128, "lora_r": 8}
    settings |= {"lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["v_proj"], "batch_size": 4, "bf16": False}
    settings |= {"learning_rate": 1e-2, "max_steps": 6, "validation_split": 0.2, "sample_tokens": 0}
    return olora.Lab(tasks=tasks, seed=0, settings=settings)


def test_old_parts_stay_and_new_ones_are_driven_away_from_them(
    olora: ModuleType, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, penalties, kept = olora.teach_newest, list[float](), list[bool]()

    def teach(name: str, weights: Any, old: Any) -> Any:
        hook = make(name, weights, old)

        def watching(gradient: torch.Tensor) -> torch.Tensor:
            kept.append(torch.equal(olora.old_part(name, weights[name], 8), old[name]))
            if olora.is_a(name):
                penalties.append(float((weights[name].detach()[8:] @ old[name].T).abs().sum()))
            return hook(gradient)

        return watching

    monkeypatch.setattr(olora, "teach_newest", teach)
    found = olora.orthogonal(lab)
    assert set(found["last"]) == set(found["learned"]) == {"capitals", "functions"}
    assert len(penalties) == 2 * 6 and len(kept) == 4 * 6 and all(kept)
    assert sum(penalties[-2:]) < 0.9 * sum(penalties[:2])


def test_all_methods_say_how_often_they_were_right(olora: ModuleType, lab: Any) -> None:
    for method in (olora.sequential, olora.joint):
        record = olora.summarise(method(lab))
        assert set(record["last"]) == {"capitals", "functions"} and 0 <= record["average"] <= 100
    fell = olora.summarise({"learned": {"a": 0.9, "b": 0.5}, "last": {"a": 0.6, "b": 0.5}})
    assert fell["forgetting"] == pytest.approx(30.0) and fell["average"] == pytest.approx(55.0)
