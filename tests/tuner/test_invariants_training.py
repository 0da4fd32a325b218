"""Invariants 8 and 9: training and growing leave the base, the frozen experts and the old outputs as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.tuner import DyLoraModel, ExpertConfig


def snapshot(model: DyLoraModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("architecture", "routing"),
    [
        ("llama", {"top_k": 2, "execution": "grouped"}),
        ("llama", {"execution": "bottleneck", "tap_layer": 1}),
        ("llama", {"granularity": "sequence", "router_scope": "per_layer"}),
        ("gemma3", {"execution": "reference"}),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_8_only_what_is_trainable_changes(
    make_model: Any, batch: Any, full_loss: Any, architecture: str, routing: Any, dense: bool
) -> None:
    """Weight decay would move anything the optimizer was given with a gradient, even one of zero."""
    model = make_model(4, architecture, **routing).train()
    model.freeze_expert("expert_0")
    model.freeze_expert("expert_2")
    if dense:
        model.set_maturity("expert_3", 0.0)
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        full_loss(model, batch).backward()
        optimizer.step()
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        trained = name.endswith((".expert_1.weight", ".expert_3.weight")) or name.startswith("routers.")
        if name.endswith((".mean", ".deviation")):
            trained = False
        assert torch.equal(value, before[name]) != trained, name


def test_8_trainable_parameters_are_the_thawed_experts_and_the_router(
    make_model: Any, batch: Any, gradients: Any
) -> None:
    model = make_model(3)
    model.freeze_expert("expert_1")

    def trainable() -> set[str]:
        """By the gradients of a pass in which all contribute."""
        model.zero_grad()
        model.set_maturity(model.expert_names[-1], 0.0)
        model(**batch).loss.backward()
        return {name.split(".")[-2] for name in gradients(model)}

    assert trainable() == {"expert_0", "expert_2", "shared"}
    model.add_expert("new")
    assert trainable() == {"expert_0", "expert_2", "shared", "new"}, "adding one must not thaw the frozen"
    model.remove_expert("expert_0")
    assert trainable() == {"expert_2", "shared", "new"}
    model.rename_expert("expert_1", "old")
    assert trainable() == {"expert_2", "shared", "new"}
    model.freeze_expert("old", frozen=False)
    assert trainable() == {"old", "expert_2", "shared", "new"}


def give_features_a_constant_part(model: DyLoraModel) -> None:
    """Of which the rows of the router see nothing: what the old experts are chosen by stays as it was."""
    for router in model.routers.values():
        router.mean.fill_(-3.0)
        with torch.no_grad():
            router.weight.copy_(router.weight - router.weight.mean(1, keepdim=True))


def never_choose_the_last(model: DyLoraModel) -> None:
    for router in model.routers.values():
        router.mean.fill_(-3.0)
        with torch.no_grad():
            router.weight[-1] = -5.0


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("alpha", [16, 11])
def test_9_a_new_expert_changes_no_bit_of_what_the_old_ones_answer(
    make_model: Any, batch: Any, experts: int, alpha: float
) -> None:
    check_growth(
        make_model(experts, expert=ExpertConfig(rank=8, alpha=alpha, target_modules=("v_proj", "down_proj"))), batch
    )


@pytest.mark.parametrize(
    ("architecture", "routing"),
    [
        ("llama", {"top_k": 2}),
        ("llama", {"granularity": "sequence", "top_k": 2}),
        ("llama", {"granularity": "sequence"}),
        ("llama", {"router_scope": "per_layer"}),
        ("gemma3", {}),
    ],
)
@pytest.mark.parametrize("experts", [3, 5])
def test_9_in_every_kind_of_routing(make_model: Any, batch: Any, architecture: str, routing: Any, experts: int) -> None:
    check_growth(make_model(experts, architecture, **routing), batch)


def check_growth(model: DyLoraModel, batch: dict[str, Tensor]) -> None:
    """Outputs before and after growth, with the old experts chosen by the same rows of the router."""
    inputs = {"input_ids": batch["input_ids"][:2]}  # padding has no embedding: its logits tie, and chance decides
    size = len(model.expert_names)
    give_features_a_constant_part(model)
    before = model(**inputs).logits
    used = {key: decision.experts for key, decision in model.decisions.items()}
    assert size == 1 or any(experts.unique().numel() > 1 for experts in used.values())
    kept = snapshot(model)
    model.add_expert("new", maturity=1.0)
    never_choose_the_last(model)
    after = model(**inputs).logits
    for key, decision in model.decisions.items():
        assert decision.num_experts == size + 1
        assert torch.equal(decision.experts, used.get(key, torch.zeros_like(decision.experts)))
    assert torch.equal(after, before)
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in kept.items() if "routers" not in name)


def test_9_a_new_expert_of_another_shape_keeps_the_old_answers(make_model: Any, batch: Any, assert_near: Any) -> None:
    model = make_model(3)
    inputs = {"input_ids": batch["input_ids"][:2]}
    with model.forced("expert_1"):
        forced = model(**inputs).logits
    give_features_a_constant_part(model)
    before = model(**inputs).logits
    model.add_expert("small", ExpertConfig(rank=4, target_modules="attention"), maturity=1.0)
    never_choose_the_last(model)
    assert_near(model(**inputs).logits, before)
    with model.forced("expert_1"):
        assert torch.equal(model(**inputs).logits, forced)
