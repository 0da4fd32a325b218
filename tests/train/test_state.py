"""Random numbers and optimizers go on from files as they would have in memory; weights of another model are refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dylora_moe.errors import RunError
from dylora_moe.train.session import Session
from dylora_moe.train.state import (
    Saved,
    load_optimizer,
    load_weights,
    random_state,
    save_optimizer,
    save_weights,
    set_random_state,
)


def through_json(record: Any) -> Any:
    return json.loads(json.dumps(record))


def test_random_numbers_of_every_kind_go_on() -> None:
    def draw() -> tuple[Any, ...]:
        normal = np.random.standard_normal(3).tolist()  # an odd number: one of a pair is kept for the next call
        return random.random(), random.gauss(0, 1), normal, torch.rand(3).tolist(), torch.randn(3).tolist()

    draw()
    saved = random_state()
    expected = [draw(), draw()]
    set_random_state(Saved(tensors=saved.tensors, record=through_json(saved.record)))
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_goes_on(tmp_path: Path, fused: bool) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        groups = [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 1 / 3, "weight_decay": 0.2}]
        return layer, torch.optim.AdamW(groups, fused=fused, betas=(0.8, 0.95))

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, times: int) -> None:
        for number in range(times):
            optimizer.zero_grad()
            layer(torch.arange(4.0) + number).square().sum().backward()
            optimizer.step()

    layer, optimizer = make()
    step(layer, optimizer, 3)
    record = save_optimizer(optimizer.state_dict(), tmp_path)
    other, fresh = make()
    other.load_state_dict(layer.state_dict())
    load_optimizer(fresh, tmp_path, through_json(record))
    step(layer, optimizer, 2)
    step(other, fresh, 2)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)


def test_weights_of_another_model_are_refused(make_session: Callable[..., Session], tmp_path: Path) -> None:
    save_weights(make_session(num_experts=2).model, tmp_path)
    same = make_session(num_experts=2).model
    with torch.no_grad():
        for parameter in same.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_weights(same, tmp_path)
    assert all(bool(parameter.any()) for parameter in same.parameters() if parameter.requires_grad)
    with pytest.raises(RunError, match="must hold the weights of this model, got others for"):
        load_weights(make_session(num_experts=3).model, tmp_path)
