"""Experts of different shapes in one Linear, and weights that move, are cast or are replaced."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dylora_moe.tuner import DyLoraModel, ExpertConfig, kernels


def mixed(make_model: Any, randomise: Any, **routing: Any) -> DyLoraModel:
    """Ranks 8, 4 and 12, of which one adapts the attention alone and one has another scaling."""
    model = make_model(1, expert=ExpertConfig(rank=8, alpha=12), **routing)
    model.add_expert("narrow", ExpertConfig(rank=4, alpha=7, target_modules="attention"), maturity=1.0)
    model.add_expert("wide", ExpertConfig(rank=12, alpha=5, use_rslora=True), maturity=1.0)
    with torch.no_grad():
        for router in model.routers.values():
            random = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(6))
            router.weight.copy_(random * 0.4)
    return randomise(model)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_of_different_rank_and_targets(
    make_base: Any,
    make_model: Any,
    randomise: Any,
    make_loop: Any,
    batch: Any,
    full_loss: Any,
    gradients: Any,
    assert_near: Any,
    dense: bool,
    top_k: int,
) -> None:
    model = mixed(make_model, randomise)
    object.__setattr__(model.routing_config, "top_k", top_k)  # a model of one expert cannot begin with two
    if dense:
        model.set_maturity("narrow", 0.0)
    runs = {}
    for execution in ("reference", "bottleneck", "grouped", "auto"):
        for _, linear in model.train().routed_linears():
            linear.execution = execution
        model.zero_grad()
        full_loss(model, batch).backward()
        runs[execution] = gradients(model)
    for execution in ("bottleneck", "grouped", "auto"):
        assert_near(runs[execution], runs["reference"])
    found = model(**batch).logits
    probs = model.decisions[None].logits.softmax(-1).detach()
    if dense:
        weights = probs
    else:
        kept = torch.zeros_like(probs).scatter(1, probs.topk(top_k).indices, 1.0)
        weights = kept * (1.0 if top_k == 1 else probs / (probs * kept).sum(1, keepdim=True))
        assert (weights.sum(0) > 0).all(), "every expert must be used"
    assert_near(found, make_loop(model, lambda layer: weights)(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_follows_its_new_weights(
    make_model: Any, batch: Any, assert_near: Any, dtype: torch.dtype
) -> None:
    model = make_model(3)
    expected = model(**batch).logits
    model.to(dtype)
    found = model(**batch).logits
    assert found.dtype == dtype
    if dtype == torch.float64:
        assert_near(found, expected.double(), 1e-4)
    routed = model.decisions[None].experts
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters() if p.requires_grad)
    model.to(torch.float32)
    again = model(**batch).logits
    if dtype == torch.float64:
        assert_near(again, expected, 1e-4)
        assert torch.equal(routed, model.decisions[None].experts)
    for name, linear in model.routed_linears():
        one = linear.lora_A["expert_1"].weight
        storages = {linear.lora_A[expert].weight.untyped_storage().data_ptr() for expert in model.expert_names}
        assert one.dtype == torch.float32 and len(storages) == 1, name


def assert_follows_weights(model: DyLoraModel, batch: dict[str, Tensor], make_loop: Any, assert_near: Any) -> None:
    found = model(**batch).logits
    decision = model.decisions[None]
    weights = torch.eye(decision.num_experts)[decision.experts[:, 0]]
    assert_near(found, make_loop(model, lambda layer: weights)(**batch).logits)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_the_ones_in_use(
    make_model: Any, batch: Any, make_loop: Any, assert_near: Any, assign: bool
) -> None:
    model = make_model(3)
    before = model(**batch).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key in state:
        if ".lora_B." in key:
            state[key] = state[key] * -1.5
    model.load_state_dict(state, assign=assign)
    assert not torch.allclose(model(**batch).logits, before, atol=0.1)
    assert_follows_weights(model, batch, make_loop, assert_near)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_optimizer_steps_are_seen_by_the_next_pass(
    make_model: Any, batch: Any, make_loop: Any, assert_near: Any
) -> None:
    """The optimizer holds the parameters from before they became views of one storage."""
    model = make_model(3).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        assert_follows_weights(model, batch, make_loop, assert_near)


def test_parameters_share_one_storage_without_overlap(make_model: Any, batch: Any) -> None:
    model = make_model(3)
    model(**batch)
    for _, linear in model.routed_linears():
        for factors in (linear.lora_A, linear.lora_B):
            weights = [factors[name].weight for name in model.expert_names]
            assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
            assert len({weight.data_ptr() for weight in weights}) == 3
            assert all(weight.is_contiguous() for weight in weights)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_bfloat16_base_with_float32_experts(make_base: Any, make_model: Any, batch: Any, granularity: str) -> None:
    model = make_model(3, base=make_base().bfloat16(), granularity=granularity)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    whole = make_model(3, granularity=granularity)
    for execution in ("auto", "bottleneck", "reference"):
        for _, linear in model.routed_linears():
            linear.execution = execution
        model.zero_grad()
        output = model.train()(**batch)
        output.loss.backward()
        assert output.logits.dtype == torch.bfloat16
        torch.testing.assert_close(output.loss.float(), whole(**batch).loss, rtol=0.05, atol=0.05)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model.decisions[None].logits.dtype == torch.float32
    prompt = {"input_ids": batch["input_ids"][:2], "attention_mask": batch["attention_mask"][:2]}
    assert model.eval().generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape == (2, 15)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
def test_autocast_trains_near_float32(make_model: Any, batch: Any, gradients: Any, dense: bool, experts: int) -> None:
    """What transformers' Trainer does with bf16=True on a float32 base."""
    model = make_model(experts).train()
    if dense:
        model.set_maturity("expert_0", 0.0)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    for name, gradient in gradients(model).items():
        cosine = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.95, name


def test_dropout_acts_in_training_only_and_once_for_all_experts(make_model: Any, batch: Any) -> None:
    model = make_model(3, expert=ExpertConfig(rank=8, dropout=0.5, target_modules="attention"))
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    torch.manual_seed(0)
    first = model(**batch).logits
    torch.manual_seed(0)
    assert torch.equal(model(**batch).logits, first)


def test_widths_that_grouped_mm_refuses_are_computed_another_way(make_model: Any, make_base: Any, batch: Any) -> None:
    base = make_base(hidden_size=36, intermediate_size=50, num_attention_heads=2, num_key_value_heads=1, head_dim=18)
    model = make_model(3, base=base)
    found = model(**batch).logits
    for _, linear in model.routed_linears():
        linear.execution = "reference"
    torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-4)


SEQUENCE = {"granularity": "sequence"}


@pytest.mark.parametrize(
    ("execution", "routing", "tokens", "is_packed", "expected"),
    [
        ("auto", SEQUENCE, 64, False, "rowwise"),
        ("auto", SEQUENCE | {"top_k": 2}, 64, False, "rowwise"),
        ("auto", SEQUENCE | {"router_scope": "per_layer"}, 64, False, "rowwise"),
        ("auto", SEQUENCE, 63, False, "grouped"),
        ("auto", SEQUENCE, 64, True, "grouped"),
        ("auto", {"granularity": "token"}, 64, False, "grouped"),
        ("rowwise", SEQUENCE, 1, False, "rowwise"),
        ("rowwise", {"granularity": "token"}, 64, False, "grouped"),
        ("grouped", SEQUENCE, 64, False, "grouped"),
        ("bottleneck", SEQUENCE, 64, False, "bottleneck"),
    ],
)
def test_which_execution_serves(
    make_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    execution: Any,
    routing: Any,
    tokens: int,
    is_packed: bool,
    expected: str,
) -> None:
    called: set[str] = set()
    for name in ("reference", "bottleneck", "rowwise", "grouped"):
        compute = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, n=name, f=compute: (called.add(n), f(*args))[1])
    model = make_model(3, execution=execution, **routing)
    ids = torch.randint(3, 99, (2, tokens))
    model(input_ids=ids, position_ids=(torch.arange(tokens) % 5).expand(2, tokens) if is_packed else None)
    assert called == {expected}


@pytest.mark.parametrize(
    ("execution", "routing", "widths", "expected"),
    [
        ("auto", {"granularity": "token"}, {}, "triton"),
        ("auto", {"granularity": "token"}, {"hidden_size": 36, "intermediate_size": 50, "head_dim": 18}, "triton"),
        ("auto", SEQUENCE, {}, "rowwise"),
        ("grouped", {"granularity": "token"}, {}, "grouped"),
        ("bottleneck", {"granularity": "token"}, {}, "bottleneck"),
    ],
)
def test_where_the_kernels_run_auto_takes_them_in_place_of_grouped(
    make_base: Any,
    make_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    execution: Any,
    routing: Any,
    widths: Any,
    expected: str,
) -> None:
    """A machine that says so; which does, and the kernels themselves, is asked in kernels/test_triton.py."""
    called: set[str] = set()
    for name in ("bottleneck", "rowwise", "grouped", "triton"):
        compute = getattr(kernels, name) if name != "triton" else lambda out, *args: out
        monkeypatch.setattr(kernels, name, lambda *args, n=name, f=compute: (called.add(n), f(*args))[1])
    monkeypatch.setattr(kernels, "takes_triton", lambda x, rank: rank == 8)
    few_heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if widths else {}
    model = make_model(3, base=make_base(**widths, **few_heads), execution=execution, **routing)
    model(input_ids=torch.randint(3, 99, (2, 64)))
    assert called == {expected}


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("change", ["none", "hook", "cast", "trained"])
def test_a_base_layer_that_does_more_than_multiply_keeps_its_own_graph(
    make_model: Any, batch: Any, gradients: Any, assert_near: Any, granularity: str, change: str
) -> None:
    """Its weight alone would not be its gradient then."""
    model = make_model(3, granularity=granularity).train()
    for _, linear in model.routed_linears():
        base = cast(torch.nn.Linear, linear.base_layer)
        if change == "hook":
            base.register_forward_hook(lambda module, args, out: out * 1.5)
        elif change == "cast":
            base.to(torch.float64)
            base.register_forward_pre_hook(lambda module, args: args[0].double())
            base.register_forward_hook(lambda module, args, out: out.float())
        elif change == "trained":
            base.weight.requires_grad_()
    runs = {}
    for execution in ("reference", "auto"):
        for _, linear in model.routed_linears():
            linear.execution = execution
        model.zero_grad()
        model(**batch).loss.backward()
        runs[execution] = gradients(model)
    assert_near(runs["auto"], runs["reference"])
    assert any("base_layer" in name for name in runs["auto"]) == (change == "trained")


def test_peft_can_switch_its_adapters_off(make_model: Any, batch: Any) -> None:
    model = make_model(2)
    with model.disabled():
        base = model(**batch).logits
    with model.peft_model.disable_adapter():
        assert torch.equal(model(**batch).logits, base)
    assert not torch.allclose(model(**batch).logits, base)


def test_a_layer_called_without_its_decoder_says_so(make_model: Any) -> None:
    model = make_model(2)
    with pytest.raises(RuntimeError, match="before its router decided"):
        next(iter(model.routed_linears()))[1](torch.zeros(1, 2, 32))
