"""Which tokens set an expert apart."""

from typing import Any

import pytest
import torch

from dylora_moe.evaluate.tokens import TokenMeter
from dylora_moe.tuner import RoutingConfig
from dylora_moe.tuner.decide import make_decision


def decide(choices: list[int]) -> Any:
    """A decision that sends each token to the expert named."""
    logits = torch.nn.functional.one_hot(torch.tensor(choices), 2).float() * 20
    count = len(choices)
    valid, rows = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.long)
    return make_decision(logits, valid, rows, None, RoutingConfig(granularity="token"), dense=False)


def test_tokens_that_are_common_everywhere_set_no_expert_apart() -> None:
    meter = TokenMeter(["code", "prose"], vocabulary=10)
    ids = [1, 1, 1, 1, 7, 7, 7, 1, 1, 1, 1, 8, 8, 8]
    meter.add([decide([0] * 7 + [1] * 7)], torch.tensor([ids]), torch.zeros(1, 14, dtype=torch.long))
    found = meter.report(lambda token: f"<{token}>")
    assert found["code"] == [{"token": "<7>", "count": 3, "share": 1.0}]
    assert found["prose"] == [{"token": "<8>", "count": 3, "share": 1.0}]


def test_order_is_by_what_a_token_adds_and_rare_ones_are_left_out() -> None:
    meter = TokenMeter(["a", "b"], vocabulary=10)
    ids = [2] * 9 + [3] * 4 + [4] * 2 + [5] * 15
    meter.add([decide([0] * 15 + [1] * 15)], torch.tensor([ids]), torch.zeros(1, 30, dtype=torch.long))
    assert [each["token"] for each in meter.report(str)["a"]] == ["2", "3"]


def test_padding_counts_for_nobody_and_a_token_is_one_however_many_layers_route_it() -> None:
    meter = TokenMeter(["a", "b"], vocabulary=10)
    ids, domain = torch.tensor([[2] * 6 + [6] + [9] * 3]), torch.tensor([[0] * 7 + [-1] * 3])
    meter.add([decide([0] * 6 + [1] + [0] * 3), decide([0] * 4 + [1] * 3 + [0] * 3)], ids, domain)
    (top,) = meter.report(str)["a"]
    assert (top["token"], top["count"]) == ("2", 5) and top["share"] == pytest.approx(5 / 6)


def test_a_common_token_comes_before_a_rare_one_that_is_more_the_experts_own() -> None:
    meter = TokenMeter(["a", "b"], vocabulary=10)
    ids = [2] * 3 + [3] * 30 + [3] * 6 + [5] * 27
    meter.add([decide([0] * 33 + [1] * 33)], torch.tensor([ids]), torch.zeros(1, 66, dtype=torch.long))
    assert [(each["token"], round(each["share"], 2)) for each in meter.report(str)["a"]] == [("3", 0.83), ("2", 1.0)]
