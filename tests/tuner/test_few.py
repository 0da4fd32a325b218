"""A pass of few tokens without gradients is computed expert by expert: the same numbers, and nothing for others."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tests.tuner.test_routed import mixed

from dylora_moe.tuner import BASE, ROUTED, DyLoraModel, kernels
from dylora_moe.tuner.decide import FEW_SLOTS


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of experts that each Linear computed for few tokens; no other execution may run."""
    found: list[int] = []
    compute = kernels.few

    def few(out: Any, x: Any, parts: Any) -> Any:
        found.append(len(parts))
        return compute(out, x, parts)

    monkeypatch.setattr(kernels, "few", few)
    return found


@torch.no_grad()
def logits(model: DyLoraModel, execution: str, ids: Any, rows: list[int] | None = None) -> Any:
    for _, linear in model.routed_linears():
        linear.execution = execution
    if rows is None:
        return model(input_ids=ids).logits
    with model.by_rows(rows):
        return model(input_ids=ids).logits


@pytest.fixture(scope="module", params=["token", "two of four", "sequence", "mixed"])
def model(request: Any, make_model: Any, randomise: Any) -> DyLoraModel:
    if request.param == "mixed":
        made = mixed(make_model, randomise)
    elif request.param == "two of four":
        made = make_model(4, top_k=2)
    else:
        made = make_model(4, granularity=request.param)
    return made.eval()


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_the_reference(model: DyLoraModel, taken: list[int], assert_near: Any, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, FEW_SLOTS // rows // model.routing_config.top_k))
    ids = torch.tensor(data.draw(st.lists(st.integers(3, 98), min_size=rows * tokens, max_size=rows * tokens)))
    speakers = st.sampled_from([ROUTED, BASE, *range(len(model.expert_names))])
    who = data.draw(st.none() | st.lists(speakers, min_size=rows, max_size=rows))
    taken.clear()
    found = logits(model, "auto", ids.view(rows, tokens), who)
    assert len(taken) == len(list(model.routed_linears()))
    assert_near(found, logits(model, "reference", ids.view(rows, tokens), who))


def test_an_expert_without_a_token_costs_nothing(make_model: Any, taken: list[int]) -> None:
    model = make_model(4).eval()
    one = torch.tensor([[7]])
    logits(model, "auto", one)
    assert set(taken) == {1}
    taken.clear()
    logits(model, "auto", one.expand(3, 1), [BASE, BASE, BASE])
    assert set(taken) == {0}
    taken.clear()
    logits(model, "auto", one.expand(3, 1), [2, BASE, 2])
    assert set(taken) == {1}


@pytest.mark.parametrize("forced", [False, True])
def test_one_expert_alone(make_model: Any, taken: list[int], assert_near: Any, forced: bool) -> None:
    model = make_model(3 if forced else 1).eval()
    ids = torch.tensor([[7]])
    if forced:
        with model.forced("expert_1"):
            found, expected = logits(model, "auto", ids), logits(model, "grouped", ids)
    else:
        found, expected = logits(model, "auto", ids), logits(model, "grouped", ids)
    assert set(taken) == {1} and len(taken) == len(list(model.routed_linears()))
    assert_near(found, expected)


def test_with_gradients_or_many_tokens_or_by_wish_it_is_not_taken(make_model: Any, taken: list[int]) -> None:
    model = make_model(3).eval()
    model(input_ids=torch.tensor([[7, 8]])).logits.sum().backward()
    logits(model, "auto", torch.full((1, FEW_SLOTS + 1), 7))
    for execution in ("grouped", "bottleneck", "reference", "rowwise"):
        logits(model, execution, torch.tensor([[7]]))
    assert not taken
    logits(model, "auto", torch.full((1, FEW_SLOTS), 7))
    assert taken


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_were_replaced_are_the_ones_in_use(
    make_model: Any, taken: list[int], assert_near: Any, assign: bool
) -> None:
    model = make_model(3).eval()
    ids = torch.tensor([[7, 8, 9]])
    before = logits(model, "auto", ids)
    for _, linear in model.routed_linears():
        for name in model.expert_names:
            changed = linear.lora_B[name].weight.data * -1.5
            if assign:
                linear.lora_B[name].load_state_dict({"weight": changed}, assign=True)
            else:
                linear.lora_B[name].weight.data = changed
    after = logits(model, "auto", ids)
    assert taken and not torch.allclose(after, before, atol=0.1)
    assert_near(after, logits(model, "reference", ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(make_model: Any, taken: list[int], dtype: torch.dtype) -> None:
    model = make_model(3).eval()
    ids = torch.tensor([[7, 8, 9]])
    expected = logits(model, "reference", ids)
    found = logits(model.to(dtype), "auto", ids)
    assert taken and found.dtype == dtype
    assert float((found - expected).abs().max()) < (0.3 if dtype == torch.bfloat16 else 1e-4)


def test_a_step_of_generation_is_the_next_token_of_a_whole_pass(
    make_model: Callable[..., Any], taken: list[int], assert_near: Any
) -> None:
    model = make_model(4, granularity="sequence").eval()
    for _, linear in model.routed_linears():
        linear.execution = "auto"
    ids = torch.randint(3, 98, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(input_ids=ids, prompt_mask=torch.arange(40).expand(2, 40) < 39).logits
        assert not taken
        prompt = torch.ones(2, 39, dtype=torch.bool)
        first = model(input_ids=ids[:, :39], prompt_mask=prompt, use_cache=True)
        second = model(input_ids=ids[:, 39:], past_key_values=first.past_key_values, use_cache=True)
    assert taken
    assert_near(second.logits[:, -1], whole[:, -1])


@pytest.mark.parametrize("execution", ["auto", "grouped", "rowwise"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_scale_that_peft_changed_counts_at_once(
    make_model: Any, assert_near: Any, forced: bool, execution: str
) -> None:
    model = make_model(3).eval()
    ids = torch.tensor([[7, 8, 9, 10]])
    with model.forced("expert_1") if forced else nullcontext():
        before = logits(model, execution, ids), logits(model, execution, ids[:, :1])
        for _, linear in model.routed_linears():
            for name in model.expert_names:
                linear.set_scale(name, 0.0)
        after = logits(model, execution, ids), logits(model, execution, ids[:, :1])
    with model.disabled():
        base = logits(model, execution, ids), logits(model, execution, ids[:, :1])
    for was, found, wanted in zip(before, after, base, strict=True):
        assert not torch.allclose(was, wanted, atol=0.1)
        assert_near(found, wanted)


def test_an_expert_that_peft_replaced_or_took_away_serves_as_it_is_now(make_model: Any, assert_near: Any) -> None:
    model = make_model(3).eval()
    one = torch.tensor([[7]])
    with model.disabled():
        base = logits(model, "auto", one)
    config = LoraConfig(r=4, lora_alpha=8)
    with model.forced("expert_1"):
        assert not torch.allclose(logits(model, "auto", one), base, atol=0.1)
        for _, linear in model.routed_linears():
            linear.update_layer("expert_1", 4, 8, config=config)  # whose B begins as zeros
        assert_near(logits(model, "auto", one), base)
    for _, linear in model.routed_linears():
        linear.delete_adapter("expert_2")
    with model.by_rows([2]):
        assert_near(logits(model, "auto", one), base)


@torch.no_grad()
def test_a_linear_can_be_exported_and_is_right_afterwards(make_model: Any) -> None:
    _, linear = next(iter(make_model(1).eval().routed_linears()))
    x = torch.randn(1, 1, linear.in_features)
    expected = linear(x)
    copied = copy.deepcopy(linear)
    for each in (linear, copied):
        exported = torch.export.export(each, (x,), strict=True)
        assert torch.equal(exported.module()(x), expected) and torch.equal(each(x), expected)
    assert not torch.equal(expected, linear.base_layer(x))


@torch.no_grad()
def test_weights_are_single_whatever_torch_makes_by_default(model: DyLoraModel) -> None:
    ids = torch.tensor([[7] * 8])
    expected = logits(model, "auto", ids)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(logits(model, "auto", ids), expected)
    finally:
        torch.set_default_dtype(before)
