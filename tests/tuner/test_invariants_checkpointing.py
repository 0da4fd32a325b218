"""Invariant 6: gradient checkpointing changes neither the loss nor any gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel, ExpertConfig, LoadWindow

CASES = [
    ("llama", {"granularity": "token", "router_scope": "shared", "tap_layer": 1}),
    ("llama", {"granularity": "token", "router_scope": "per_layer", "top_k": 2}),
    ("llama", {"granularity": "sequence", "router_scope": "shared"}),
    ("llama", {"granularity": "sequence", "router_scope": "per_layer", "tap_layer": 1}),
    ("gemma3", {"granularity": "token", "router_scope": "per_layer", "tap_layer": 1, "top_k": 2}),
]
each_case = pytest.mark.parametrize(
    ("architecture", "routing"), CASES, ids=["-".join(map(str, (name, *r.values()))) for name, r in CASES]
)
EXACT = 1e-6


def count_passes(model: DyLoraModel, layer: int) -> list[int]:
    """Each pass through a Linear of the layer adds one to the list's only number."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    model.lm.get_decoder().layers[layer].self_attn.o_proj.register_forward_pre_hook(add)
    return count


@each_case
def test_6_checkpointing_changes_no_loss_and_no_gradient(
    make_model: Any,
    batch: Any,
    full_loss: Any,
    gradients: Any,
    assert_near: Any,
    architecture: str,
    routing: Any,
) -> None:
    model = make_model(
        3, architecture, expert=ExpertConfig(rank=8, dropout=0.3, target_modules=("v_proj", "down_proj")), **routing
    ).train()
    tap = routing.get("tap_layer", 0)
    passes, below = count_passes(model, 2), count_passes(model, 0)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(4)  # of dropout
        loss = full_loss(model, batch)
        loss.backward()
        return loss.detach(), gradients(model)

    expected_loss, expected = step()
    assert passes == [1]
    model.activation_checkpointing_enable()
    loss, found = step()
    assert passes == [3], "the layer must run again in backward, or nothing is tested"
    assert below == [2 if tap else 3], "below the tap there is nothing to recompute"
    assert_near(loss, expected_loss, EXACT)
    assert_near(found, expected, EXACT)
    assert all(grad.abs().max() > 1e-4 for name, grad in found.items() if name.startswith("routers"))


@pytest.mark.parametrize("router_scope", ["shared", "per_layer"])
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_6_two_forwards_before_one_backward(
    make_model: Any,
    batch: Any,
    full_loss: Any,
    gradients: Any,
    assert_near: Any,
    router_scope: str,
    granularity: str,
) -> None:
    """Each recomputed layer must find the decisions of its own pass, not of the last one."""
    other = {name: value.flip(0) for name, value in batch.items()}
    other["input_ids"] = torch.where(other["input_ids"] > 0, (other["input_ids"] + 30) % 96 + 3, 0)
    model = make_model(3, granularity=granularity, router_scope=router_scope).train()

    def step(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        window = LoadWindow()
        loss = full_loss(model, first, window)
        (loss + 2 * full_loss(model, second, window)).backward()
        return gradients(model)

    expected = step(batch, other)
    model.activation_checkpointing_enable()
    assert_near(step(batch, other), expected, EXACT)


@pytest.mark.parametrize("mode", ["forced", "disabled_between", "dense"])
def test_6_what_was_in_force_is_in_force_again(
    make_model: Any, batch: Any, gradients: Any, assert_near: Any, mode: str
) -> None:
    """The backward pass comes after the block that forced an expert, or within one that switches all off."""
    model = make_model(3).train()
    if mode == "dense":
        model.set_maturity("expert_1", 0.2)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        with model.forced("expert_1" if mode == "forced" else None):
            loss = model(**batch).loss
        if mode == "disabled_between":
            with model.disabled():
                model(**batch)
                loss.backward()
        else:
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = step()
    model.activation_checkpointing_enable()
    assert_near(step(), expected, EXACT)


def test_6_a_graph_may_be_walked_twice(make_model: Any, batch: Any, assert_near: Any) -> None:
    """Trainers do so to compare the gradients of two losses."""
    model = make_model(3).train()
    model.activation_checkpointing_enable()
    factors = [p for p in model.peft_model.parameters() if p.requires_grad]
    loss = model(**batch).loss
    once = torch.autograd.grad(loss, factors, retain_graph=True)
    for first, second in zip(once, torch.autograd.grad(loss, factors), strict=True):
        assert torch.equal(first, second)


def test_6_backward_stops_at_the_tap(make_model: Any, batch: Any) -> None:
    model = make_model(3, tap_layer=1).train()
    model.activation_checkpointing_enable()
    seen: list[bool] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).requires_grad)

    model.lm.model.layers[1].register_forward_pre_hook(look, with_kwargs=True)
    model(**batch).loss.backward()
    assert seen == [False]


def test_6_reentrant_checkpointing_is_refused(make_model: Any) -> None:
    with pytest.raises(TunerError, match="non-reentrant"):
        make_model(2).activation_checkpointing_enable({"use_reentrant": True})
