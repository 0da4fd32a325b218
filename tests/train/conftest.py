"""Runs on the tiny base: sessions and trainers to look into, and one whole run."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import lean_process, settings, tiny_base, tiny_rows, tiny_settings
from tests.train.streams import stream, whole
from torch import Tensor
from transformers import TrainerCallback

from dylora_moe.bases import LoadedBase, load_base
from dylora_moe.config import RunConfig, make_config
from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.build import build_run_data
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.stored import Rows
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train
from dylora_moe.train.session import Session, build_model
from dylora_moe.tuner.head import read_head

__all__ = ["lean_process", "stream", "tiny_base", "tiny_rows", "tiny_settings", "whole"]


@pytest.fixture
def tiny_config(tiny_settings: Callable[..., dict[str, Any]]) -> Callable[..., RunConfig]:
    """(**changes) -> the checked settings of a tiny run."""
    return lambda **changes: make_config(tiny_settings(**changes))


@pytest.fixture(scope="session")
def finished(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(settings, run folder, result) of a run of 5 steps with an evaluation every 2; not to be changed."""
    config = make_config(settings(tiny_base, tiny_rows, tmp_path_factory.mktemp("runs")) | WHOLE_RUN)
    result = json.loads(json.dumps(train(config), allow_nan=False))
    return config, RunDir(config.run_dir), result


WHOLE_RUN = {"max_steps": 5, "eval_steps": 2}


@pytest.fixture(scope="session")
def loaded(tiny_base: Path, tiny_rows: dict[str, Path]) -> tuple[LoadedBase, DataBundle]:
    """The tiny base, to be copied, and its data."""
    base = load_base(str(tiny_base), dtype=torch.float32)
    return base, build_run_data(make_config(settings(tiny_base, tiny_rows, Path())), base.tokenizer)


@pytest.fixture
def make_session(
    tiny_config: Callable[..., RunConfig], loaded: tuple[LoadedBase, DataBundle], randomise: Callable[..., Any]
) -> Callable[..., Session]:
    """(rows, **changes) -> a session without dropout whose experts do something, training on those rows if given.

    Always the same weights for the same settings.
    """

    def make(rows: Sequence[TokenizedRow] | None = None, **changes: Any) -> Session:
        plain = {"lora_dropout": 0.0, "balance_coefficient": 0.0}
        config = tiny_config(**plain | changes)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        base = replace(loaded[0], model=deepcopy(loaded[0].model))
        torch.manual_seed(0)
        model = randomise(build_model(config, base))
        data = loaded[1] if rows is None else replace(loaded[1], train=Rows.of(rows))
        run = RunDir(config.run_dir)
        return Session(config=config, run=run, base=base, data=data, model=model, head=read_head(model.lm))

    return make


class Gradients(TrainerCallback):
    """Keeps each step's gradients, by parameter name, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(gradients_of(model))


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.fixture
def gradients() -> Gradients:
    return Gradients()
