"""Experts side by side in memory: what trains, what an optimizer sees, what a state dict holds."""

from typing import Any

import pytest
import torch

from dylora_moe.tuner import DyLoraModel, ExpertConfig
from dylora_moe.tuner.packed import PackedFactor, runs_of


@pytest.mark.parametrize(
    ("flags", "bounds"),
    [("", []), ("0", []), ("1", [(0, 1)]), ("111", [(0, 3)]), ("0110", [(1, 3)]), ("10111", [(0, 1), (2, 5)])],
)
def test_runs_are_the_unbroken_stretches(flags: str, bounds: list[tuple[int, int]]) -> None:
    assert runs_of([flag == "1" for flag in flags]) == bounds


def test_each_run_gets_the_gradients_of_its_experts() -> None:
    factor, weights = PackedFactor(), [torch.nn.Parameter(torch.randn(2, 3)) for _ in range(4)]
    factor.lay_out(weights, [True, False, True, True])
    whole, (first, last) = factor(), factor.runs
    assert whole.data_ptr() == weights[0].data_ptr() == first.data_ptr()
    (whole * torch.arange(24.0).view(4, 2, 3)).sum().backward()
    assert first.grad is not None and torch.equal(first.grad, torch.arange(6.0).view(1, 2, 3))
    assert last.grad is not None and torch.equal(last.grad, torch.arange(12.0, 24).view(2, 2, 3))


def trained(model: DyLoraModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_neighbours_train_as_one_parameter(make_model: Any) -> None:
    model = make_model(4)
    assert len(trained(model)) == 2 * 9 + 1, "two factors of nine Linears, and the router"
    model.freeze_expert("expert_1")
    assert len(trained(model)) == 4 * 9 + 1
    linear = dict(model.routed_linears())["model.layers.0.mlp.down_proj"]
    assert [tuple(run.shape) for run in linear.packed_A.runs] == [(1, 8, 64), (2, 8, 64)]
    assert [linear.trains(name) for name in model.expert_names] == [True, False, True, True]
    for name in model.expert_names:
        model.freeze_expert(name)
    assert list(trained(model)) == ["routers.shared.weight"]


def test_an_optimizer_keeps_its_parameters_through_passes_casts_and_freezing_again(make_model: Any, batch: Any) -> None:
    model = make_model(3)
    model.freeze_expert("expert_1")
    before, values = trained(model), {name: value.clone() for name, value in model.state_dict().items()}
    model(**batch)
    model.to(torch.float64).to(torch.float32)
    model.freeze_expert("expert_1")
    after = trained(model)
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in values.items())


def test_experts_follow_to_where_an_engine_moves_what_trains(make_model: Any, batch: Any) -> None:
    model = make_model(3)
    before = model(**batch).logits
    for parameter in trained(model).values():
        parameter.data = parameter.data.clone()  # as DeepSpeed does, into memory of its own
    model.follow_moved_weights()
    moved = trained(model)
    assert torch.equal(model(**batch).logits, before)
    with torch.no_grad():
        for parameter in moved.values():
            parameter.mul_(2)
    assert not torch.allclose(model(**batch).logits, before)
    for _, linear in model.routed_linears():
        for factor, weights in ((linear.packed_A, linear.lora_A), (linear.packed_B, linear.lora_B)):
            assert torch.equal(factor.runs[0], torch.stack([weights[name].weight for name in model.expert_names]))
    assert all(parameter is moved[name] for name, parameter in trained(model).items())


def test_a_grown_mixture_keeps_the_parameters_of_the_runs_before(make_model: Any) -> None:
    model = make_model(3)
    model.freeze_expert("expert_2")
    before = trained(model)
    model.add_expert("new")
    after = trained(model)
    assert all(after[name] is parameter for name, parameter in before.items() if "packed" in name)
    assert len(after) == 2 * len(before) - 1


def test_a_state_dict_names_each_expert_once(make_model: Any) -> None:
    model = make_model(2)
    names = list(model.state_dict())
    assert not [name for name in names if "packed" in name]
    assert sum(".lora_A.expert_1.weight" in name for name in names) == 9
    assert model.load_state_dict(model.state_dict()).missing_keys == []


def test_experts_of_odd_rank_train_one_by_one(make_model: Any, batch: Any, gradients: Any) -> None:
    model = make_model(2, expert=ExpertConfig(rank=6, target_modules=("v_proj",)))
    assert len(trained(model)) == 2 * 2 * 3 + 1
    model(**batch).loss.backward()
    assert all(".lora_" in name or name.startswith("routers") for name in gradients(model))
    model.freeze_expert("expert_0")
    assert len(trained(model)) == 2 * 3 + 1
