"""What trains is counted by part, and each way of it being wrong stops the run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dylora_moe.errors import TunerError
from dylora_moe.train.parameters import check_parameters, count_parameters

TARGETS = ("k_proj", "v_proj", "down_proj")


def counts(model: Any) -> dict[str, tuple[int, int]]:
    return {part.part: (part.trainable, part.frozen) for part in count_parameters(model)}


def expert_parameters(model: Any) -> list[nn.Parameter]:
    """What the optimizer is given of the experts, however it lies in memory."""
    return [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("routers.")]


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_each_part_is_counted_once(make_base: Any, make_model: Callable[..., Any], scope: str) -> None:
    base = make_base()
    linears = [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.endswith(TARGETS)]
    of_expert = sum(8 * (linear.in_features + linear.out_features) for linear in linears)
    of_base = sum(parameter.numel() for parameter in base.parameters())
    model = make_model(4, base=base, router_scope=scope)
    routers = 1 if scope == "shared" else 3
    found = counts(model)
    assert list(found) == ["base", "router", "expert_0", "expert_1", "expert_2", "expert_3"]
    assert found["base"] == (0, of_base) and found["router"] == (routers * 4 * 32, 0)
    assert all(found[f"expert_{index}"] == (of_expert, 0) for index in range(4))
    check_parameters(model)
    model.freeze_expert("expert_2")
    assert counts(model)["expert_2"] == (0, of_expert) and counts(model)["expert_1"] == (of_expert, 0)
    check_parameters(model)


def test_a_single_lora_has_no_router(make_model: Callable[..., Any]) -> None:
    model = make_model(1)
    assert list(counts(model)) == ["base", "expert_0"]
    check_parameters(model)


def test_what_trains_is_what_the_optimizer_gets(make_model: Callable[..., Any]) -> None:
    model = make_model(3)
    model.freeze_expert("expert_0")
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == sum(part.trainable for part in count_parameters(model))


def test_a_base_weight_that_trains_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model(2)
    norm = next(p for name, p in model.named_parameters() if name.endswith("norm.weight"))
    norm.requires_grad_(True)
    with pytest.raises(TunerError, match="base"):
        check_parameters(model)


@pytest.mark.parametrize("place", [0, -1])
def test_an_expert_matrix_that_does_not_train_is_refused(make_model: Callable[..., Any], place: int) -> None:
    model = make_model(2)
    expert_parameters(model)[place].requires_grad_(False)
    with pytest.raises(TunerError, match="frozen"):
        check_parameters(model)


def test_a_router_that_does_not_train_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model(2)
    model.routers.requires_grad_(False)
    with pytest.raises(TunerError, match="router"):
        check_parameters(model)


def test_a_frozen_expert_that_trains_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model(1)
    parameters = expert_parameters(model)
    model.freeze_expert("expert_0")
    check = {id(p) for p in model.parameters()}
    revived = [p for p in parameters if id(p) in check]
    for parameter in revived or [p for n, p in model.named_parameters() if ".lora_A." in n]:
        parameter.requires_grad_(True)
    with pytest.raises(TunerError):
        check_parameters(model)


@pytest.mark.parametrize("experts", [1, 2])
def test_nothing_to_train_is_refused(make_model: Callable[..., Any], experts: int) -> None:
    model = make_model(experts)
    for name in model.expert_names:
        model.freeze_expert(name)
    with pytest.raises(TunerError, match="nothing trains: every expert is frozen"):
        check_parameters(model)


def test_counting_changes_nothing(make_model: Callable[..., Any]) -> None:
    model = make_model(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_parameters(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
