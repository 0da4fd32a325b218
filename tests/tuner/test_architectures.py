"""The lighter matrix: other families of models, with biases, fused projections, soft caps and sliding windows."""

from typing import Any

import pytest
import torch

FAMILIES = ("mistral", "qwen2", "phi", "phi3", "gemma2")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_family_routes_like_stock_peft_and_generates(
    make_model: Any, make_base: Any, make_loop: Any, batch: Any, assert_near: Any, architecture: str
) -> None:
    model = make_model(3, architecture, top_k=2, router_scope="per_layer", tap_layer=1)
    with model.disabled():
        assert torch.equal(model(**batch).logits, make_base(architecture)(**batch).logits)
    found = model(**batch)
    decisions = dict(model.decisions)
    assert list(decisions) == [1, 2]

    def weights(layer: int) -> torch.Tensor:
        probs = decisions[layer].logits.softmax(-1)
        kept = probs * torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
        return kept / kept.sum(1, keepdim=True)

    expected = make_loop(model, weights, architecture)(**batch)
    assert_near(found.logits, expected.logits)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)

    prompt = {"input_ids": batch["input_ids"][:2], "attention_mask": batch["attention_mask"][:2]}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**prompt, **settings)
    assert torch.equal(cached, model.generate(**prompt, **settings, use_cache=False))
