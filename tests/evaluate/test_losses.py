"""Losses of domains equal a slow loop: one row at a time, all logits, torch's cross entropy."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dylora_moe.evaluate.losses import Evaluation, evaluate_domains, score_domains
from dylora_moe.tuner.head import read_head


def measure(model: Any, data: Any, **changes: Any) -> Evaluation:
    arguments = {"rows": data.validation, "batch_size": 4, "pad_token_id": 0} | changes
    return evaluate_domains(model, read_head(model.lm), **arguments)


@torch.no_grad()
def slow_loop(model: Any, rows: Any) -> dict[str, tuple[float, int, float]]:
    """Domain -> loss a labelled token, number of those tokens, share that were the likeliest."""
    found = {}
    for domain, domain_rows in rows.items():
        total, count, right = 0.0, 0, 0
        for row in domain_rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
            total += float(F.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="sum"))
            count += int((labels != -100).sum())
            right += int((logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
        found[domain] = (total / count, count, right / count)
    return found


@pytest.mark.parametrize(
    "routing", [{"granularity": "token", "top_k": 2}, {"granularity": "sequence", "router_scope": "per_layer"}], ids=str
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_losses_equal_a_slow_loop(mixture: Any, data: Any, routing: Any, batch_size: int) -> None:
    model = mixture(**routing)
    found = measure(model, data, batch_size=batch_size)
    expected = slow_loop(model, data.validation)
    assert [result.domain for result in found.domains] == list(expected)
    for result in found.domains:
        loss, tokens, accuracy = expected[result.domain]
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert (result.tokens, result.rows) == (tokens, 6)
        assert result.accuracy == pytest.approx(accuracy)
    assert found.mean_loss == pytest.approx(sum(loss for loss, *_ in expected.values()) / 3, rel=1e-5)
    assert len({round(loss, 4) for loss, *_ in expected.values()}) == 3


def test_each_row_has_its_own_score_in_its_own_place(mixture: Any, data: Any) -> None:
    model = mixture(granularity="token")
    scores = score_domains(model, read_head(model.lm), data.validation, batch_size=4, pad_token_id=0)
    assert [len(each) for each in scores.values()] == [6, 6, 6]
    for domain, rows in data.validation.items():
        for row, score in zip(rows, scores[domain], strict=True):
            loss, tokens, accuracy = slow_loop(model, {domain: [row]})[domain]
            assert score.nll == pytest.approx(loss * tokens, rel=1e-5)
            assert (score.tokens, score.right) == (tokens, round(accuracy * tokens))
    assert len({round(score.nll, 3) for score in scores["sums"]}) > 1


def test_who_looks_on_is_told_domains_by_their_place_whatever_rows_say(mixture: Any, data: Any) -> None:
    """Rows of a stream's skills were each prepared alone, so that all say domain 0."""
    model, seen = mixture(granularity="token"), list[tuple[int, int]]()
    rows = {name: [replace(row, domain=0) for row in each] for name, each in data.validation.items()}
    lengths = [sum(len(row) for row in each) for each in rows.values()]

    def look(decisions: Any, ids: torch.Tensor, domain: torch.Tensor) -> None:
        assert ids.shape == domain.shape
        seen.extend((int(place), int((domain == place).sum())) for place in domain.unique())

    score_domains(model, read_head(model.lm), rows, batch_size=4, pad_token_id=0, observe=look)
    assert [sum(count for place, count in seen if place == index) for index in range(3)] == lengths
    assert any(place < 0 for place, _ in seen), "padding is of no domain"


@torch.no_grad()
def test_the_table_is_that_of_the_rows_one_by_one(mixture: Any, data: Any) -> None:
    model = mixture(granularity="token")
    report = measure(model, data).routing
    assert report is not None
    units = 0
    for place, rows in enumerate(data.validation.values()):
        load = torch.zeros(3)
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
            load += model.decisions[None].load().sum(0)
        units += int(load.sum())
        assert report.table[place] == pytest.approx((load / load.sum()).tolist(), abs=1e-6)
    # Padding is no unit: the rows have different lengths.
    assert report.units == units == sum(len(row) for rows in data.validation.values() for row in rows)


def test_a_row_counts_for_the_domain_it_is_given_under(mixture: Any, data: Any) -> None:
    model = mixture(granularity="token")
    expected = measure(model, data)
    muddled = {name: [replace(row, domain=2) for row in rows] for name, rows in data.validation.items()}
    assert measure(model, data, rows=muddled) == expected


def test_dropout_is_off_and_the_mode_is_left_as_it_was(mixture: Any, data: Any) -> None:
    expected = measure(mixture(), data)
    model = mixture(dropout=0.5).train()
    assert measure(model, data) == expected
    assert model.training and all(layer.training for layer in model.lm.modules())
    model.eval()
    measure(model, data)
    assert not model.training


def test_the_mode_comes_back_after_an_error_too(mixture: Any, data: Any) -> None:
    model = mixture().train()
    bad = {"d": [replace(data.validation["sums"][0], input_ids=(10**6,) * 3, labels=(1,) * 3)]}
    with pytest.raises(IndexError):
        measure(model, data, rows=bad)
    assert model.training


def test_no_router_no_routing(mixture: Any, data: Any) -> None:
    assert measure(mixture(1), data).routing is None
    model = mixture()
    routed = measure(model, data)
    with model.forced("expert_1"):
        forced = measure(model, data)
        assert slow_loop(model, data.validation)["sums"][0] == pytest.approx(forced.domains[2].loss, rel=1e-5)
    with model.disabled():
        alone = measure(model, data)
    assert routed.routing is not None and forced.routing is None and alone.routing is None
    assert len({round(each.mean_loss, 4) for each in (routed, forced, alone)}) == 3
