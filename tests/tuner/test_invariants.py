"""Invariants 1, 2, 3 and 7: equality with PEFT and with a loop, causality, the router's gradient."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.tuner import DyLoraModel, ExpertConfig

BOTH = ("llama", "gemma3")
ROUTINGS = [
    {"granularity": granularity, "router_scope": scope, "tap_layer": tap, "top_k": top_k}
    for granularity, scope, (tap, top_k) in product(("token", "sequence"), ("shared", "per_layer"), ((0, 2), (1, 1)))
]
CASES = [("llama", routing) for routing in ROUTINGS] + [("gemma3", ROUTINGS[3]), ("gemma3", ROUTINGS[4])]
each_case = pytest.mark.parametrize(
    ("architecture", "routing"), CASES, ids=["-".join(map(str, (name, *r.values()))) for name, r in CASES]
)


def train_step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the LoRA factors under names that stock PEFT shares."""
    output = model(**batch)
    output.loss.backward()
    factors = {name: p.grad for name, p in model.named_parameters() if ".lora_" in name and p.grad is not None}
    return output.logits.detach(), {name[name.index("model.layers") :]: grad for name, grad in factors.items()}


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_1_one_expert_equals_a_peft_lora(
    make_model: Any, make_loop: Any, batch: Any, assert_near: Any, architecture: str, use_rslora: bool
) -> None:
    model = make_model(1, architecture, expert=ExpertConfig(rank=4, alpha=6, use_rslora=use_rslora))
    one = torch.ones(batch["input_ids"].numel(), 1)
    logits, gradients = train_step(model, batch)
    expected, expected_gradients = train_step(make_loop(model, lambda layer: one, architecture), batch)
    assert_near(logits, expected)
    assert_near(gradients, expected_gradients)
    assert len(gradients) == 2 * sum(1 for _ in model.routed_linears())


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("experts", [1, 4])
def test_1_disabled_experts_leave_the_base_bit_for_bit(
    make_model: Any, make_base: Any, batch: Any, architecture: str, experts: int
) -> None:
    model, expected = make_model(experts, architecture), make_base(architecture)(**batch).logits
    with model.disabled():
        assert torch.equal(model(**batch).logits, expected)
        assert not model.decisions
    assert not torch.allclose(model(**batch).logits, expected, atol=0.1), "the experts must do something"


@each_case
def test_2_executions_equal_each_other_and_a_loop_over_stock_peft_adapters(
    make_model: Any,
    make_loop: Any,
    batch: Any,
    full_loss: Any,
    gradients: Any,
    assert_near: Any,
    architecture: str,
    routing: Any,
) -> None:
    expert = ExpertConfig(rank=8, alpha=12) if routing["top_k"] == 2 else None  # all Linears, or the few of most tests
    model = make_model(4, architecture, expert=expert, **routing).train()

    def step(execution: str) -> tuple[Tensor, dict[str, Tensor]]:
        for _, linear in model.routed_linears():
            linear.execution = execution
        model.zero_grad()
        loss = full_loss(model, batch)
        loss.backward()
        return loss.detach(), gradients(model)

    expected_loss, expected = step("reference")
    assert all(grad.abs().max() > 1e-4 for name, grad in expected.items() if name.startswith("routers"))
    for execution in ("bottleneck", "rowwise", "grouped"):
        loss, found = step(execution)
        assert_near(loss, expected_loss)
        assert_near(found, expected)

    found = model(**batch).logits
    assert all(decision.load().sum(0).count_nonzero() > 1 for decision in model.decisions.values())
    loop = make_loop(model, lambda layer: sparse_weights(token_logits(model, layer), routing["top_k"]), architecture)
    assert_near(found, loop(**batch).logits)


def sparse_weights(logits: Tensor, top_k: int) -> Tensor:
    """The weights of method section 2 by hand, (units, experts): straight-through at k = 1, renormalised above."""
    probs = logits.softmax(-1)
    kept = torch.zeros_like(probs).scatter(1, probs.topk(top_k).indices, 1.0)
    chosen = probs * kept
    return chosen + (kept - chosen).detach() if top_k == 1 else chosen / chosen.sum(-1, keepdim=True)


def token_logits(model: DyLoraModel, layer: int) -> Tensor:
    """Logits of the decision that a layer follows, one row per token."""
    decision = model.state.decision_for(layer)
    assert decision is not None
    return decision.logits if decision.unit_of_token is None else decision.logits[decision.unit_of_token]


@each_case
def test_3_later_tokens_change_nothing_before_them(
    make_model: Any, batch: Any, assert_near: Any, architecture: str, routing: Any
) -> None:
    """Labels are changed with the tokens, as in training; where the prompts end stays."""
    model = make_model(4, architecture, **routing)
    for training in (False, True):
        expected = model.train(training)(**batch).logits
        for position in (5, 8, 11):
            changed = change_from(batch, position)
            assert_near(model(**changed).logits[:, :position], expected[:, :position])
        early = change_from(batch, 1)
        assert not torch.allclose(model(**early).logits[:, 6:], expected[:, 6:], atol=0.1)


def change_from(batch: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    changed = {name: value.clone() for name, value in batch.items()}
    ids, labels = changed["input_ids"], changed["labels"]
    ids[:, position:] = torch.where(ids[:, position:] > 0, (ids[:, position:] + 41) % 96 + 3, 0)
    labels[:, position:] = torch.where(labels[:, position:] >= 0, ids[:, position:], -100)
    return changed


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("prompts", ["mask", "none", "labels_without_prompt"])
def test_3_documents_are_causal_with_any_kind_of_prompt(
    make_model: Any, batch: Any, assert_near: Any, training: bool, prompts: str
) -> None:
    """A text without a prompt decides by its first `prefix_tokens`, and is causal from the last of them on."""
    model = make_model(4, granularity="sequence", prefix_tokens=4).train(training)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if prompts == "mask":
        inputs["prompt_mask"] = torch.arange(12).expand(3, 12) < 4
    expected = None
    for position in (12, 4, 6, 9):
        ids = change_from(batch, position)["input_ids"]
        labels = {"labels": ids} if prompts == "labels_without_prompt" else {}
        logits = model(**inputs | {"input_ids": ids} | labels).logits
        expected = logits if expected is None else expected
        assert_near(logits[:, :position], expected[:, :position])
    inside = model(**inputs | {"input_ids": change_from(batch, 3)["input_ids"]})
    assert not torch.allclose(inside.logits[:, 6:], expected[:, 6:], atol=0.1)


@pytest.mark.parametrize(
    ("architecture", "execution", "granularity"),
    [
        ("llama", "bottleneck", "token"),
        ("llama", "grouped", "sequence"),
        ("llama", "rowwise", "sequence"),
        ("gemma3", "grouped", "token"),
    ],
)
def test_7_language_loss_reaches_the_router_at_one_expert_a_token(
    make_model: Any,
    make_loop: Any,
    make_base: Any,
    batch: Any,
    assert_near: Any,
    architecture: str,
    execution: str,
    granularity: str,
) -> None:
    """Against autograd through the loop over stock adapters, with logits made by hand from the embeddings."""
    model = make_model(4, architecture, top_k=1, execution=execution, granularity=granularity).train()
    model(**batch).loss.backward()
    router = model.routers["shared"].weight

    with torch.no_grad():
        features = make_base(architecture).get_input_embeddings()(batch["input_ids"]).float()
    if granularity == "sequence":
        pooled = [row[:length].mean(0) for row, length in zip(features, (3, 4, 5), strict=True)]
        features = torch.stack(pooled)[:, None].expand(3, 12, -1)
    features = features.flatten(0, 1)
    features = features * (features.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    weight = router.detach().clone().requires_grad_()
    loop = make_loop(model, lambda layer: sparse_weights(features @ weight.T, 1), architecture)
    loop(**batch).loss.backward()

    assert router.grad is not None and weight.grad is not None
    assert weight.grad.abs().max() > 1e-3
    assert_near(router.grad, weight.grad, 2e-5)
