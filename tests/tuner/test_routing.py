"""Sorting tokens by expert, and what a decision says to tokens, losses and Linears."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.tuner.config import RoutingConfig
from dylora_moe.tuner.decide import make_decision
from dylora_moe.tuner.routing import Decision, RoutingState, make_dispatch


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(2, num_experts)))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=top_k, unique=True))
    rows = draw(st.lists(st.permutations(used), min_size=1, max_size=9))
    return torch.tensor(rows)[:, :top_k], num_experts


@given(choices())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_dispatch_sorts_slots_by_expert(case: tuple[torch.Tensor, int]) -> None:
    experts, num_experts = case
    plan = make_dispatch(experts, num_experts)
    slots, top_k = experts.numel(), experts.shape[1]
    assert plan.expert_of_slot.tolist() == sorted(experts.flatten().tolist())
    assert torch.equal(plan.slot_order[plan.sorted_of_slot], torch.arange(slots))
    assert torch.equal(experts.flatten()[plan.slot_order], plan.expert_of_slot)
    assert torch.equal(plan.token_of_slot, plan.slot_order // top_k)
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    assert plan.offsets.tolist() == counts.cumsum(0).tolist()
    assert plan.offsets.dtype == torch.int32
    for expert in range(num_experts):
        run = plan.slot_order[plan.expert_of_slot == expert]
        assert torch.equal(run, run.sort().values), "the sort must be stable"


def decide(
    logits: torch.Tensor, *, dense: bool = False, unit_of_token: torch.Tensor | None = None, **settings: Any
) -> Decision:
    units = logits.shape[0]
    valid = torch.ones(units, dtype=torch.bool)
    valid[-1] = False
    config = RoutingConfig(**settings)
    return make_decision(logits, valid, torch.arange(units), unit_of_token, config, dense=dense)


def test_load_counts_each_valid_unit_once_and_padding_never() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 0.0, 9.0]], requires_grad=True)
    assert torch.equal(decide(logits).load(), torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]]))
    two = decide(logits, top_k=2).load()
    torch.testing.assert_close(two.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert two[0, 1] == 0 and two[1, 0] == 0
    dense = decide(logits, dense=True).load()
    torch.testing.assert_close(dense[:2], logits[:2].softmax(-1))
    assert not two.requires_grad and not dense.requires_grad


def test_what_is_unsure_is_left_to_the_base_or_to_all() -> None:
    logits, valid = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 9.0]]), torch.tensor([True, True, False])
    rows = torch.arange(3)

    def made(sure: list[bool], **settings: Any) -> Decision:
        return make_decision(logits, valid, rows, rows, RoutingConfig(**settings), dense=False, sure=torch.tensor(sure))

    base = made([False, True, True])
    assert base.weights.tolist() == [[0], [1], [1]] and base.load().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert base.slot_weights is not None and base.dispatch is not None
    assert base.slot_weights[base.dispatch.sorted_of_slot].tolist() == [0, 1, 1]
    dense = made([False, True, True], unsure="dense", temperature=2.0)
    assert dense.experts is None and dense.dispatch is None
    torch.testing.assert_close(dense.weights[0], (logits[0] / 2).softmax(-1))
    assert dense.weights[1:].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert made([True, True, False], unsure="dense").experts is not None, "padding makes no pass dense"


def test_decision_of_documents_reaches_every_token() -> None:
    unit_of_token = torch.tensor([1, 1, 0, 2])
    decision = decide(torch.eye(3) * 5, unit_of_token=unit_of_token)
    experts = decision.token_experts()
    assert experts is not None and experts.flatten().tolist() == [1, 1, 0, 2]
    assert decision.token_weights().shape == (4, 1)
    assert decision.dispatch is not None and decision.dispatch.expert_of_slot.tolist() == [0, 1, 1, 2]
    dense = decide(torch.eye(3) * 5, dense=True, unit_of_token=unit_of_token)
    assert dense.token_experts() is None and dense.dispatch is None
    assert torch.equal(dense.token_weights(), dense.weights[unit_of_token])


def test_state_prefers_the_shared_decision() -> None:
    one, other = decide(torch.eye(3)), decide(torch.eye(3) * 2)
    assert RoutingState(decisions={None: one}).decision_for(7) is one
    assert RoutingState(decisions={7: other, 8: one}).decision_for(7) is other
    assert RoutingState().decision_for(0) is None
