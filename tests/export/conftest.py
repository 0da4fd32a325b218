"""A mixture on the tiny base whose experts differ in rank, targets and scaling, and a run that a recipe trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.tiny import finished_run, lean_process, tiny_base, tiny_rows

from dylora_moe.bases import load_base
from dylora_moe.data.templates import ensure_template
from dylora_moe.tuner import DyLoraModel, RoutingConfig, save_model

__all__ = ["finished_run", "lean_process", "tiny_base", "tiny_rows"]

LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "down_proj"]},
    "wide": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["v_proj", "q_proj"]},
    "upper": {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="session")
def mixture_folder(tiny_base: Path, randomise: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load_base(str(tiny_base), dtype=torch.float32)
    configs = [LoraConfig(task_type="CAUSAL_LM", **values) for values in LORAS.values()]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = DyLoraModel(
            base.model, list(LORAS), routing=RoutingConfig(granularity="sequence"), peft_configs=configs
        )
    ensure_template(base.tokenizer)
    folder = tmp_path_factory.mktemp("mixture") / "model"
    revision = base.resolved.revision
    save_model(randomise(model), folder, base_name=str(tiny_base), base_revision=revision, tokenizer=base.tokenizer)
    return folder
