"""A small run and a small stream, trained by this code, and folders of theirs that a test may change."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.report.measured import write_evaluations, write_warning
from tests.tiny import lean_process, settings, tiny_base, tiny_rows
from tests.train.streams import make_stream

from dylora_moe.config import make_config
from dylora_moe.train.run import train

__all__ = ["lean_process", "tiny_base", "tiny_rows"]


@pytest.fixture(scope="session")
def trained(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder of a run of three experts, of a single LoRA and of a stream; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    joint = settings(tiny_base, tiny_rows, folder) | {"max_steps": 8, "eval_steps": 2, "logging_steps": 2}
    configs = {
        "joint": make_config(joint | {"run_name": "joint"}),
        "single": make_config(joint | {"run_name": "single", "num_experts": 1, "max_steps": 2}),
        "stream": make_stream(tiny_base, tiny_rows, folder, run_name="stream", logging_steps=1),
    }
    for config in configs.values():
        train(config)
    return {name: config.run_dir for name, config in configs.items()}


@pytest.fixture
def run_of(trained: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """(name, as_name, measured) -> a copy of a trained run's records in the test's own folder."""

    def copy(name: str, as_name: str | None = None, *, measured: bool = False) -> Path:
        target = tmp_path / (as_name or name)
        shutil.copytree(
            trained[name], target, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors", "tokenizer*")
        )
        if measured:
            write_evaluations(target)
            write_warning(target)
        return target

    return copy
