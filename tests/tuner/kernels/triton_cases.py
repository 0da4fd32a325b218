"""Run by test_triton.py in a process of its own: the Triton kernels against the loop in float64.

On the CPU under TRITON_INTERPRET=1, which must be set before triton is imported; else on a GPU.
"""

import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dylora_moe.tuner import kernels
from dylora_moe.tuner.kernels.trial import are_alike
from dylora_moe.tuner.routing import make_dispatch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The arguments of an execution, float32, and the gradient of its output."""

    x: Tensor
    weights: Tensor
    """(tokens, top_k)"""
    experts: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scales: Tensor
    grad: Tensor

    def leaves(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("x", "weights", "lora_a", "lora_b")}
        return {name: value.to(DEVICE, dtype, copy=True).requires_grad_() for name, value in found.items()}


def draw_case(
    *, experts: int, used: list[int], top_k: int, tokens: int, rank: int, inputs: int, outputs: int, seed: int
) -> Case:
    random = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, len(used), generator=random).argsort(1)[:, :top_k]
    return Case(
        x=torch.randn(tokens, inputs, generator=random),
        weights=torch.rand(tokens, top_k, generator=random) + 0.1,
        experts=torch.tensor(used)[order],
        lora_a=torch.randn(experts, rank, inputs, generator=random),
        lora_b=torch.randn(experts, outputs, rank, generator=random),
        scales=torch.rand(experts, generator=random) + 0.5,
        grad=torch.randn(tokens, outputs, generator=random),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any subset of the experts may be used, so some are empty and sometimes one has all tokens."""
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(3, experts)))
    return draw_case(
        experts=experts,
        used=draw(st.lists(st.integers(0, experts - 1), min_size=top_k, unique=True)),
        top_k=top_k,
        tokens=draw(st.sampled_from([0, 1, 2, 7, 33, 70])),
        rank=draw(st.sampled_from([1, 4, 8, 16, 24, 64])),
        inputs=draw(st.sampled_from([5, 32, 100])),
        outputs=draw(st.sampled_from([3, 64, 100])),
        seed=draw(st.integers(0, 10_000)),
    )


def in_loop(case: Case) -> dict[str, Tensor]:
    """Output and gradients by the reference in float64."""
    leaves = case.leaves(torch.float64)
    x, weights, lora_a, lora_b = leaves.values()
    gates = torch.zeros(x.shape[0], lora_a.shape[0], dtype=x.dtype, device=DEVICE)
    gates = gates.scatter(1, case.experts.to(DEVICE), weights)
    out = kernels.reference(x, gates, lora_a, lora_b, case.scales.to(DEVICE, torch.float64))
    return collected(out, leaves, case.grad.to(DEVICE, torch.float64))


def by_triton(case: Case, leaves: dict[str, Tensor], out: Tensor, base: Tensor | None = None) -> Tensor:
    x, weights, lora_a, lora_b = leaves.values()
    plan = make_dispatch(case.experts.to(DEVICE), lora_a.shape[0])
    slot_weights = weights.reshape(-1).index_select(0, plan.slot_order)
    return kernels.triton(out, x, slot_weights, lora_a, lora_b, case.scales.to(DEVICE), plan, base)


def run(case: Case, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients by Triton in float32."""
    leaves = case.leaves()
    out = by_triton(case, leaves, torch.zeros(case.grad.shape, device=DEVICE))
    return collected(out, leaves, case.grad.to(DEVICE) if grad is None else grad)


def collected(out: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.numel():
            error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-6)
            assert error <= tolerance, f"{name}: relative error {error:.2e}"


@given(case=cases())
@settings(deadline=None, max_examples=30, derandomize=True)
def test_equals_the_loop(case: Case) -> None:
    assert_near(run(case), in_loop(case))


WIDE = {"experts": 3, "used": [0, 2], "tokens": 90, "rank": 24, "inputs": 576, "outputs": 130, "seed": 1}
SMALL = {"experts": 3, "used": [0, 1, 2], "tokens": 40, "rank": 8, "inputs": 20, "outputs": 36, "seed": 3}


@pytest.mark.parametrize("top_k", [1, 2])
def test_many_blocks_and_an_empty_expert(top_k: int) -> None:
    case = draw_case(top_k=top_k, **WIDE)
    found = run(case)
    assert_near(found, in_loop(case))
    assert not found["lora_a"][1].any() and not found["lora_b"][1].any()


@pytest.mark.parametrize("rank", [128, 256])
def test_large_ranks(rank: int) -> None:
    case = draw_case(top_k=1, **SMALL | {"rank": rank})
    assert_near(run(case), in_loop(case))


def test_every_element_is_written() -> None:
    """What was in new memory shows nowhere."""
    case = draw_case(top_k=1, **SMALL | {"used": [1]})
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        found = run(case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_near(found, in_loop(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_experts", ["float32", "as the input"])
def test_sixteen_bits(dtype: torch.dtype, of_experts: str) -> None:
    case = draw_case(top_k=2, **SMALL)
    leaves = case.leaves(dtype)
    for name in ("weights",) if of_experts == "as the input" else ("weights", "lora_a", "lora_b"):
        leaves[name] = getattr(case, name).to(DEVICE, copy=True).requires_grad_()
    out = by_triton(case, leaves, torch.zeros(case.grad.shape, dtype=dtype, device=DEVICE))
    found = collected(out, leaves, case.grad.to(DEVICE, dtype))
    assert {name: found[name].dtype for name in leaves} == {name: leaf.dtype for name, leaf in leaves.items()}
    assert found["out"].dtype == dtype
    assert_near(found, in_loop(case), tolerance=0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("has_base", [False, True])
def test_what_is_there_is_added_to_in_place(top_k: int, has_base: bool) -> None:
    case, weight = draw_case(top_k=top_k, **SMALL), torch.randn(36, 20).to(DEVICE)
    expected, leaves = in_loop(case), case.leaves()
    there = torch.randn(8, 5, 36).to(DEVICE)
    out = there.clone()
    found = by_triton(case, leaves, out, weight if has_base else None)
    assert found.data_ptr() == out.data_ptr()
    torch.testing.assert_close(found.flatten(0, 1).double(), there.flatten(0, 1) + expected["out"], rtol=0, atol=1e-3)
    found.backward(case.grad.to(DEVICE).view(8, 5, 36))
    if has_base:
        expected["x"] = expected["x"] + case.grad.to(DEVICE).double() @ weight.double()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert_near(gradients, {name: expected[name] for name in leaves})


def test_strides_are_taken_as_they_are() -> None:
    """An expanded gradient, transposed inputs and factors, a weight in between others."""
    case = draw_case(top_k=1, **SMALL)
    ones = torch.ones((), device=DEVICE).expand(40, 36)
    expected = in_loop(replace(case, grad=torch.ones(40, 36)))
    leaves = {name: odd(leaf.detach()).requires_grad_() for name, leaf in case.leaves().items()}
    assert not any(leaf.is_contiguous() for leaf in leaves.values())
    out = odd(torch.zeros(40, 36, device=DEVICE))
    plan = make_dispatch(case.experts.to(DEVICE), 3)
    x, weights, lora_a, lora_b = leaves.values()
    sorted_weights = weights[:, 0].index_select(0, plan.slot_order)
    slot_weights = torch.stack([sorted_weights, torch.full_like(sorted_weights, torch.nan)], 1)[:, 0]
    assert slot_weights.stride() == (2,)
    found = kernels.triton(out, x, slot_weights, lora_a, lora_b, odd(case.scales.to(DEVICE)), plan)
    assert_near(collected(found, leaves, ones), expected)


def odd(values: Tensor) -> Tensor:
    """The same numbers, every second of a larger memory, in the opposite order of axes."""
    roomy = torch.full((*reversed(values.shape), 2), float("nan"), device=values.device)
    view = roomy[..., 0].permute(*reversed(range(values.dim())))
    return view.copy_(values)


@pytest.mark.parametrize("frozen", ["x", "weights", "lora_a", "lora_b"])
def test_what_needs_no_gradient_gets_none_and_the_others_keep_theirs(frozen: str) -> None:
    case = draw_case(top_k=2, **SMALL)
    expected, leaves = run(case), case.leaves()
    leaves[frozen].requires_grad_(False)
    by_triton(case, leaves, torch.zeros(40, 36, device=DEVICE)).backward(case.grad.to(DEVICE))
    assert leaves.pop(frozen).grad is None
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, expected[name])


def test_saved_are_the_input_and_what_is_of_the_ranks_size() -> None:
    case = draw_case(top_k=2, **SMALL)
    leaves, saved = case.leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        x, weights, lora_a, lora_b = leaves.values()
        plan = make_dispatch(case.experts.to(DEVICE), 3)
        slot_weights = weights.detach().reshape(-1).index_select(0, plan.slot_order)
        saved.clear()
        kernels.triton(
            torch.zeros(40, 36, device=DEVICE), x, slot_weights, lora_a, lora_b, case.scales.to(DEVICE), plan
        )
    known = {t.data_ptr() for t in (*leaves.values(), slot_weights)}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in known) == [(3,), (80, 8)]


def test_a_second_run_gives_the_same_bits() -> None:
    case = draw_case(top_k=2, **SMALL)
    first, second = run(case), run(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("routing", [{"top_k": 1}, {"top_k": 2}, {"granularity": "sequence"}])
def test_serves_a_model_by_name(make_model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, routing: Any) -> None:
    """A frozen expert among others that train, and a router that learns."""
    launched: list[str] = []
    module = sys.modules["dylora_moe.tuner.kernels.triton"]
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda name, *args, **kw: (launched.append(name), launch(name, *args, **kw)))
    model = make_model(3, **routing).to(DEVICE).train()
    model.freeze_expert("expert_1")
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    runs = {}
    for execution in ("reference", "triton"):
        for _, linear in model.routed_linears():
            linear.execution = execution
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        runs[execution] = {"loss": loss.detach(), **gradients}
    assert runs["triton"].keys() == runs["reference"].keys()
    # On a GPU the base's own products differ between two passes, too.
    assert_near(runs["triton"], runs["reference"], TOLERANCE if IS_INTERPRETED else 1e-4)
    assert set(launched) == {"shrink", "expand", "collect"}


@pytest.mark.skipif(not IS_INTERPRETED, reason="on a GPU `auto` takes the kernels")
def test_an_interpreter_is_never_taken_by_itself(make_model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["dylora_moe.tuner.kernels.triton"], "_launch")
    make_model(3)(**batch).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_pass_the_trial_that_auto_asks_for(dtype: torch.dtype) -> None:
    assert are_alike(kernels.triton, kernels.grouped, device=torch.device(DEVICE), dtype=dtype)
