"""Routers, gates and the losses on routing, against sums written by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.tuner.router import LinearRouter, dense_gates, sparse_gates


def test_router_standardises_what_it_reads() -> None:
    router = LinearRouter(16, 3)
    features = torch.randn(200, 16) * 40 + 100
    router.calibrate(features)
    seen = router.normalise(features)
    torch.testing.assert_close(seen.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.pow(2).mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(router(features), seen @ router.weight.T)
    torch.testing.assert_close(router.normalise(features * 3), seen, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_float32_whatever_the_base_is(dtype: torch.dtype) -> None:
    router, features = LinearRouter(16, 3), torch.randn(5, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = router(features)
    assert router(features).dtype == under_autocast.dtype == torch.float32
    assert torch.equal(router(features), under_autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_works_after_a_cast(dtype: torch.dtype) -> None:
    router, features = LinearRouter(16, 3), torch.randn(5, 16)
    expected = router(features)
    torch.testing.assert_close(router.to(dtype)(features), expected, atol=0.05, rtol=0.05)
    assert router(features).dtype == torch.float32


@pytest.mark.parametrize("units", [1, 3, 36, 200])
def test_a_new_row_changes_no_bit_of_the_other_logits(units: int) -> None:
    """GEMM kernels are chosen by shape, and round differently."""
    generator = torch.Generator().manual_seed(units)
    for size in range(1, 17):
        router = LinearRouter(32, size)
        features = torch.randn(units, 32, generator=generator)
        before = router(features)
        router.resize(list(range(size)), added=1)
        assert torch.equal(router(features)[:, :size], before), size


def test_seeding_puts_each_cluster_at_an_expert_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator) * 3
    cluster = torch.arange(80) % 4
    features = centres[cluster] + 0.3 * torch.randn(80, 16, generator=generator)
    router = LinearRouter(16, 4)
    router.calibrate(features)
    router.seed_from(features)
    chosen = router(features).argmax(1)
    assert len({(int(a), int(b)) for a, b in zip(cluster, chosen, strict=True)}) == 4
    assert chosen.unique().numel() == 4
    torch.testing.assert_close(router.weight.norm(dim=1), torch.ones(4))
    before = router.weight.clone()
    router.seed_from(features[:3])
    assert torch.equal(router.weight, before), "fewer units than experts leave the rows as they are"


def test_fitting_finds_the_least_regularised_cross_entropy() -> None:
    """Against plain gradient descent on the same sum, from another start."""
    draw = torch.Generator().manual_seed(0)
    experts = torch.arange(60) % 3
    features = torch.randn(3, 12, generator=draw)[experts] + 0.8 * torch.randn(60, 12, generator=draw)
    router = LinearRouter(12, 3)
    router.fit(features, experts)
    known = router.normalise(features).double()
    slow = torch.randn(3, 12, generator=draw, dtype=torch.float64, requires_grad=True)
    for _ in range(4000):
        loss = torch.nn.functional.cross_entropy(known @ slow.t(), experts, reduction="sum") + slow.square().sum() / 2
        (gradient,) = torch.autograd.grad(loss, slow)
        with torch.no_grad():
            slow -= 0.01 * gradient
    torch.testing.assert_close(router.weight.double(), slow, atol=1e-4, rtol=0)
    assert router.weight.requires_grad and (router(features).argmax(1) == experts).float().mean() > 0.9


def test_resize_keeps_rows_in_the_order_asked_for_and_adds_fresh_ones() -> None:
    router = LinearRouter(8, 3)
    before = router.weight.detach().clone()
    router.resize([2, 0], added=2)
    assert torch.equal(router.weight[:2], before[[2, 0]])
    assert router.weight.shape == (4, 8) and router.weight.requires_grad
    assert router.weight[2:].abs().sum() > 0 and not torch.equal(router.weight[2], router.weight[3])
    router.weight.requires_grad_(False)
    router.resize([0], added=1)
    assert not router.weight.requires_grad


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_one_expert_has_weight_exactly_one_and_the_gradient_of_its_probability(values: list[float]) -> None:
    logits = torch.tensor([values], requires_grad=True)
    probs = logits.softmax(-1)
    experts, weights = sparse_gates(logits, probs, 1)
    assert weights.item() == 1.0
    assert probs[0, experts.item()] == probs.max()
    (found,) = torch.autograd.grad(weights.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(probs[0, experts.item()], logits)
    torch.testing.assert_close(found, expected)


def test_two_experts_share_by_their_renormalised_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    experts, weights = sparse_gates(logits, logits.softmax(-1), 2)
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[3.0, 2.0]]).softmax(-1))


def test_an_expert_never_chosen_changes_no_bit_of_the_weights() -> None:
    """A softmax over more experts rounds otherwise, even where the new probability is zero."""
    generator = torch.Generator().manual_seed(0)
    for size in range(2, 17):
        logits = torch.randn(200, size, generator=generator)
        more = torch.cat([logits, torch.full((200, 1), -200.0)], 1)
        for top_k in (1, 2):
            experts, weights = sparse_gates(logits, logits.softmax(-1), top_k)
            now, then = sparse_gates(more, more.softmax(-1), top_k)
            assert torch.equal(now, experts) and torch.equal(then, weights), (size, top_k)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dense_gates_soften_with_temperature(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0]])
    weight = 1 / (1 + math.exp(-2 / temperature))
    torch.testing.assert_close(dense_gates(logits, temperature), torch.tensor([[1 - weight, weight]]))
