"""What is measured here: tiny mixtures with random experts, and one finished run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import finished_run, lean_process, tiny_base, tiny_rows, tiny_settings

from dylora_moe.bases import load_base, load_tokenizer
from dylora_moe.data.build import build_data
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.settings import DataSettings
from dylora_moe.tuner import DyLoraModel, ExpertConfig, RoutingConfig

__all__ = ["finished_run", "lean_process", "tiny_base", "tiny_rows", "tiny_settings"]


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


@pytest.fixture(scope="session")
def data(tiny_rows: dict[str, Path], tokenizer: Any) -> DataBundle:
    """18 training and 6 validation rows of each of three domains."""
    datasets = [{"path": str(path), "domain": domain} for domain, path in tiny_rows.items()]
    return build_data(datasets, tokenizer, DataSettings(max_length=128, validation_split=0.25))


@pytest.fixture(scope="session")
def mixture(tiny_base: Path, randomise: Callable[..., Any]) -> Callable[..., DyLoraModel]:
    """(number of experts, dropout, **routing) -> a mixture on the tiny base, random experts, in evaluation mode."""

    def make(experts: int = 3, *, dropout: float = 0.0, **routing: Any) -> DyLoraModel:
        base = load_base(str(tiny_base), dtype=torch.float32).model
        names = [f"expert_{index}" for index in range(experts)]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            expert = ExpertConfig(rank=8, dropout=dropout, target_modules=("v_proj", "down_proj"))
            model = DyLoraModel(base, names, expert_config=expert, routing=RoutingConfig(**routing))
        return randomise(model).eval()

    return make
