"""Figures on routing against numbers worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.evaluate.routing import RoutingMeter, RoutingReport, routing_changes
from dylora_moe.tuner import Decision, RoutingConfig
from dylora_moe.tuner.decide import make_decision


def decision(
    probs: list[list[float]],
    experts: list[list[int]] | None,
    *,
    weights: list[list[float]] | None = None,
    valid: list[bool] | None = None,
    unit_of_token: list[int] | None = None,
) -> Decision:
    """A decision of one unit a token, each chosen expert at weight 1 unless said."""
    matrix = torch.tensor(probs)
    made = make_decision(
        matrix.log(),
        torch.tensor([True] * len(probs) if valid is None else valid),
        torch.zeros(len(probs), dtype=torch.long),
        None if unit_of_token is None else torch.tensor(unit_of_token),
        RoutingConfig(granularity="token"),
        dense=experts is None,
    )
    return replace(
        made,
        probs=matrix,
        experts=None if experts is None else torch.tensor(experts),
        weights=torch.ones(len(probs), 1) if weights is None else torch.tensor(weights),
    )


def sure(experts: list[int], num_experts: int, **others: Any) -> Decision:
    """Each unit certain of one expert."""
    probs = torch.eye(num_experts)[experts].tolist()
    return decision(probs, [[expert] for expert in experts], **others)


def report(decisions: list[Decision], domain: list[int], num_experts: int, num_domains: int) -> RoutingReport:
    meter = RoutingMeter([f"e{i}" for i in range(num_experts)], [f"d{i}" for i in range(num_domains)])
    meter.add(decisions, torch.tensor(domain))
    found = meter.report()
    assert found is not None
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_an_expert_for_each_domain_is_all_the_information_there_is(count: int) -> None:
    found = report([sure(list(range(count)), count)], list(range(count)), count, count)
    assert found.mutual_information == pytest.approx(math.log2(count))
    assert found.load_entropy == pytest.approx(1) and found.effective_experts == pytest.approx(count)
    assert found.max_violation == pytest.approx(0) and found.dead == ()
    assert found.decision_entropy == pytest.approx(0, abs=1e-6)
    assert found.table == tuple(tuple(row) for row in torch.eye(count).tolist())


def test_experts_that_ignore_domains_tell_nothing() -> None:
    found = report([sure([0, 1, 0, 1], 2)], [0, 0, 1, 1], 2, 2)
    assert found.mutual_information == pytest.approx(0, abs=1e-9)
    assert found.table == ((0.5, 0.5), (0.5, 0.5))


def test_a_collapsed_router() -> None:
    found = report([sure([0, 0, 0], 4)], [0, 1, 1], 4, 2)
    assert found.load == (1, 0, 0, 0) and found.dead == ("e1", "e2", "e3")
    assert found.load_entropy == pytest.approx(0, abs=1e-9) and found.effective_experts == pytest.approx(1)
    assert found.max_violation == pytest.approx(3) and found.mutual_information == pytest.approx(0, abs=1e-9)


def test_weights_of_several_experts_by_hand() -> None:
    probs = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]]
    made = decision(probs, [[0, 1], [1, 0], [2, 0]], weights=[[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    found = report([made], [0, 0, 1], 3, 2)
    # Domain 0: (0.75 + 0.5, 0.25 + 0.5, 0) of 2 units; domain 1: all on the last expert.
    assert [round(share, 6) for row in found.table for share in row] == [0.625, 0.375, 0, 0, 0, 1]
    assert found.load == pytest.approx((1.25 / 3, 0.75 / 3, 1 / 3))
    entropy = -sum(share * math.log(share) for share in (1.25 / 3, 0.75 / 3, 1 / 3))
    assert found.load_entropy == pytest.approx(entropy / math.log(3))
    assert found.effective_experts == pytest.approx(math.exp(entropy))
    assert found.max_violation == pytest.approx(1.25 - 1)
    assert found.mutual_information == pytest.approx(math.log2(3) - 2 / 3)  # H(domain): the expert gives it away
    first, last = 1.5 * math.log(2), -(0.25 * math.log(0.125) + 0.75 * math.log(0.75))
    assert found.decision_entropy == pytest.approx((2 * first + last) / 3 / math.log(3))
    assert found.units == 3


def test_padding_is_left_out() -> None:
    made = sure([0, 1, 1, 1], 2, valid=[True, True, False, False])
    found = report([made], [0, 1, 0, 1], 2, 2)
    assert found.units == 2 and found.load == (0.5, 0.5) and found.table == ((1, 0), (0, 1))
    unsure = decision([[1.0, 0.0], [0.5, 0.5]], [[0], [1]], valid=[True, False])
    assert report([unsure], [0, 0], 2, 1).decision_entropy == pytest.approx(0, abs=1e-6)


def test_documents_find_their_domain_through_their_tokens() -> None:
    made = sure([0, 0, 1, 1], 2, unit_of_token=[0, 1, 1, 2, 2, 3, 3], valid=[True, True, True, False])
    assert report([made], [1, -1, 1, 0, -1, -1, -1], 2, 2).table == ((0, 1), (1, 0))


def test_dense_collaboration_counts_by_weight() -> None:
    made = decision([[0.5, 0.5]], None, weights=[[0.25, 0.75]])
    assert report([made], [0], 2, 1).load == (0.25, 0.75)


@pytest.mark.parametrize(("served", "dead"), [(4, ("e1",)), (6, ())])
def test_an_expert_is_dead_below_a_hundredth_of_its_share(served: int, dead: tuple[str, ...]) -> None:
    # The even share of two experts is 1/2, so the line is at 0.005: 4 or 6 of 1000 units.
    made = sure([0] * (1000 - served) + [1] * served, 2)
    assert report([made], [0] * 1000, 2, 1).dead == dead


def test_passes_and_routers_add_up_until_cleared() -> None:
    meter = RoutingMeter(["a", "b"], ["d"])
    assert meter.report() is None
    where = torch.tensor([0])
    meter.add([], where)
    assert meter.report() is None
    meter.add([sure([0], 2), sure([1], 2)], where)
    meter.add([sure([1], 2), sure([1], 2)], where)
    found = meter.report()
    assert found is not None and found.units == 4 and found.load == (0.25, 0.75)
    assert (found.experts, found.domains) == (("a", "b"), ("d",))
    meter.clear()
    assert meter.report() is None


def test_a_domain_without_a_unit_has_an_empty_row() -> None:
    found = report([sure([0], 2)], [0], 2, 2)
    assert found.table == ((1, 0), (0, 0)) and found.mutual_information == pytest.approx(0, abs=1e-9)


def answered_by_the_base(experts: list[int], num_experts: int, near: list[bool], **others: Any) -> Decision:
    """As `sure`, but for the units that no skill is near."""
    weights = [[float(one)] for one in near]
    return replace(sure(experts, num_experts, weights=weights, **others), sure=torch.tensor(near))


def test_what_the_base_answers_is_in_no_experts_load() -> None:
    made = answered_by_the_base([0, 1, 0, 1], 2, [True, False, False, False], valid=[True, True, True, False])
    found = report([made, sure([0, 1, 0, 1], 2, valid=[True] * 3 + [False])], [0, 0, 1, 1], 2, 3)
    assert found.units == 6 and found.unsure == pytest.approx(2 / 6)
    assert found.domain_unsure == (pytest.approx(1 / 4), pytest.approx(1 / 2), 0)
    assert found.table == (pytest.approx((2 / 3, 1 / 3)), (1, 0), (0, 0)) and found.load == pytest.approx((0.75, 0.25))
    assert report([sure([0, 1], 2)], [0, 1], 2, 2).unsure == 0


def test_figures_stay_figures_when_the_base_answers_everything() -> None:
    found = report([answered_by_the_base([0, 1], 2, [False, False])], [0, 1], 2, 2)
    assert found.unsure == 1 and found.domain_unsure == (1, 1) and found.load == (0, 0)
    assert found.max_violation == 0 and found.load_entropy == 0 and found.mutual_information == 0


def test_counting_goes_on_from_what_was_counted() -> None:
    whole, halves = (RoutingMeter(["a", "b"], ["d", "e"]) for _ in range(2))
    where = torch.tensor([0, 1])
    passes = [[answered_by_the_base([0, 1], 2, [True, near])] for near in (False, True, False)]
    for one in passes:
        whole.add(one, where)
        sums = {name: value.clone() for name, value in halves.sums().items()}
        halves = RoutingMeter(["a", "b"], ["d", "e"])
        halves.set_sums(sums)
        halves.add(one, where)
    assert halves.report() == whole.report()


def test_nothing_learns_from_being_measured() -> None:
    logits: Tensor = torch.zeros(2, 2, requires_grad=True)
    made = replace(decision([[0.5, 0.5]] * 2, [[0], [1]]), probs=logits.softmax(-1))
    meter = RoutingMeter(["a", "b"], ["d"])
    meter.add([made], torch.tensor([0, 0]))
    assert isinstance(meter._entropy, Tensor) and not meter._entropy.requires_grad


def test_changes_of_routing_are_the_load_that_moved() -> None:
    def seen(step: int, table: list[list[float]], split: str = "validation", experts: str = "ab") -> dict[str, Any]:
        return {"step": step, "split": split, "domains": ["x", "y"], "experts": [*experts], "table": table}

    reports = [
        seen(0, [[1.0, 0.0], [0.5, 0.5]]),
        seen(4, [[0.0, 1.0], [0.0, 1.0]], split="train"),
        seen(5, [[0.0, 1.0], [0.5, 0.5]]),
        seen(9, [[0.0, 1.0], [0.25, 0.75]]),
        seen(12, [[1.0, 0.0], [1.0, 0.0]], experts="ac"),
    ]
    assert routing_changes(reports) == [{"step": 5, "change": 0.5}, {"step": 9, "change": 0.125}]
    assert routing_changes([]) == []
