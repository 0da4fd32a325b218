"""Invariant 2 at the level of one Linear: the fast executions against the obvious loop in float64."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dylora_moe.tuner import kernels
from dylora_moe.tuner.routing import make_dispatch

TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`rows` of `length` tokens; one decision a row, so a token where the length is 1."""

    x: Tensor
    weights: Tensor
    experts: Tensor
    length: int
    lora_a: Tensor
    lora_b: Tensor
    scales: Tensor
    grad: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any subset of the experts may be used, so some are empty and sometimes one has all tokens."""
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(2, num_experts)))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=top_k, unique=True))
    rows, length, rank = draw(st.integers(1, 17)), draw(st.sampled_from([1, 1, 3])), draw(st.sampled_from([4, 8]))
    inputs, outputs = draw(st.sampled_from([4, 12, 32])), draw(st.sampled_from([4, 8, 20]))
    scales = draw(st.lists(st.floats(0.125, 4, width=32), min_size=num_experts, max_size=num_experts))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    order = torch.rand(rows, len(used), generator=random).argsort(1)[:, :top_k]
    return Case(
        x=torch.randn(rows * length, inputs, generator=random),
        weights=torch.rand(rows, top_k, generator=random) + 0.1,
        experts=torch.tensor(used)[order],
        length=length,
        lora_a=torch.randn(num_experts, rank, inputs, generator=random),
        lora_b=torch.randn(num_experts, outputs, rank, generator=random),
        scales=torch.tensor(scales),
        grad=torch.randn(rows * length, outputs, generator=random),
    )


def leaves_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    given = {"x": case.x, "weights": case.weights, "lora_a": case.lora_a, "lora_b": case.lora_b}
    return {name: value.to(dtype, copy=True).requires_grad_() for name, value in given.items()}


def apply(case: Case, execution: str, leaves: dict[str, Tensor]) -> Tensor:
    """The products alone, (tokens, features_out)."""
    x, weights, lora_a, lora_b = leaves.values()
    scales, num_experts = case.scales.to(weights.dtype), case.lora_a.shape[0]
    out = torch.zeros(x.shape[0], lora_b.shape[1], dtype=x.dtype)
    if execution == "rowwise":
        rows = x.unflatten(0, (-1, case.length))
        zeros = out.unflatten(0, (-1, case.length)).clone()
        return kernels.rowwise(zeros, rows, weights, case.experts, lora_a, lora_b, scales).flatten(0, 1)
    weights, experts = (value.repeat_interleave(case.length, 0) for value in (weights, case.experts))
    if execution == "grouped":
        plan = make_dispatch(experts, num_experts)
        slot_weights = weights.reshape(-1).index_select(0, plan.slot_order)
        return kernels.grouped(out, x, slot_weights, lora_a, lora_b, scales, plan)
    gates = torch.zeros(x.shape[0], num_experts, dtype=weights.dtype).scatter(1, experts, weights)
    return getattr(kernels, execution)(x, gates, lora_a, lora_b, scales)


def run(case: Case, execution: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and the gradients of all inputs, by name."""
    leaves = leaves_of(case, dtype)
    out = apply(case, execution, leaves)
    found = torch.autograd.grad(out, list(leaves.values()), case.grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def assert_equal_runs(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-6)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("execution", ["reference", "bottleneck", "rowwise", "grouped"])
@given(case=cases())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_executions_equal_the_loop(execution: str, case: Case) -> None:
    assert_equal_runs(run(case, execution), run(case, "reference", torch.float64))


def test_the_loop_is_what_the_formula_says() -> None:
    """One token, two experts, by hand."""
    x, gates = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.75]])
    lora_a = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    lora_b = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    out = kernels.reference(x, gates, lora_a, lora_b, torch.tensor([2.0, 4.0]))
    assert out.tolist() == [[0.25 * 2 * 1 * 1 + 0.75 * 4 * 2 * 3, 0.25 * 2 * 1 * 2]]


@pytest.mark.parametrize("execution", ["bottleneck", "rowwise", "grouped"])
@pytest.mark.parametrize("frozen", ["x", "weights", "lora_a", "lora_b"])
def test_what_needs_no_gradient_gets_none_and_the_others_keep_theirs(execution: str, frozen: str) -> None:
    case = _fixed_case()
    expected, leaves = run(case, execution), leaves_of(case)
    leaves[frozen].requires_grad_(False)
    apply(case, execution, leaves).backward(case.grad)
    assert leaves.pop(frozen).grad is None
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, expected[name])


def _fixed_case() -> Case:
    random = torch.Generator().manual_seed(3)
    return Case(
        x=torch.randn(7, 8, generator=random),
        weights=torch.rand(7, 2, generator=random),
        experts=torch.rand(7, 3, generator=random).argsort(1)[:, :2],
        length=1,
        lora_a=torch.randn(3, 8, 8, generator=random),
        lora_b=torch.randn(3, 16, 8, generator=random),
        scales=torch.tensor([2.0, 0.5, 1.5]),
        grad=torch.randn(7, 16, generator=random),
    )


@pytest.mark.parametrize("execution", ["bottleneck", "rowwise", "grouped"])
def test_expanded_gradients_are_taken(execution: str) -> None:
    """sum() hands back a stride-0 gradient, which grouped_mm refuses."""
    case = _fixed_case()
    ones = Case(**{n: getattr(case, n) for n in Case.__slots__} | {"grad": torch.ones(()).expand(7, 16)})
    assert_equal_runs(run(ones, execution), run(ones, "reference", torch.float64))


@pytest.mark.parametrize("execution", ["reference", "bottleneck", "rowwise", "grouped"])
def test_float32_experts_on_bfloat16_inputs(execution: str) -> None:
    case = _fixed_case()
    expected, leaves = run(case, "reference", torch.float64), leaves_of(case)
    leaves["x"] = case.x.bfloat16().requires_grad_()
    out = apply(case, execution, leaves)
    out.float().backward(case.grad)
    assert out.dtype == torch.bfloat16
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype, name
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert_equal_runs({"out": out.detach(), **found}, expected, tolerance=0.05)


@pytest.mark.parametrize("execution", ["reference", "bottleneck", "rowwise", "grouped"])
def test_autocast_trains_in_every_execution(execution: str) -> None:
    """An inner tensor under autocast may be float32 or bfloat16, whatever its inputs are."""
    case = _fixed_case()
    expected, leaves = run(case, "reference", torch.float64), leaves_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        out = apply(case, execution, leaves)
    out.float().backward(case.grad)
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert_equal_runs({"out": out.detach(), **found}, expected, tolerance=0.05)


def in_place(execution: str, case: Case, out: Tensor, leaves: dict[str, Tensor], base: Tensor | None = None) -> Tensor:
    """The products added to `out`, (7, 1, features_out); every token a row of its own."""
    x, weights, lora_a, lora_b = leaves.values()
    if execution == "rowwise":
        return kernels.rowwise(out, x[:, None], weights, case.experts, lora_a, lora_b, case.scales, base)
    plan = make_dispatch(case.experts, 3)
    slot_weights = weights.reshape(-1).index_select(0, plan.slot_order)
    return kernels.grouped(out, x, slot_weights, lora_a, lora_b, case.scales, plan, base)


@pytest.mark.parametrize("execution", ["rowwise", "grouped"])
def test_what_is_there_is_added_to_and_its_gradient_passed_on(execution: str) -> None:
    case = _fixed_case()
    expected, leaves = run(case, "reference", torch.float64), leaves_of(case)
    there = torch.randn(7, 1, 16, requires_grad=True)
    out = there * 1.0
    found = in_place(execution, case, out, leaves)
    assert found.data_ptr() == out.data_ptr()
    torch.testing.assert_close(found[:, 0].double(), there[:, 0].double() + expected["out"], rtol=1e-4, atol=1e-4)
    found.backward(case.grad[:, None])
    assert there.grad is not None and torch.equal(there.grad[:, 0], case.grad)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert_equal_runs({"out": expected["out"], **gradients}, expected)


@pytest.mark.parametrize("execution", ["rowwise", "grouped"])
def test_the_gradient_goes_through_a_base_without_a_graph(execution: str) -> None:
    """Given its weight, the input's gradient is that of base and products together."""
    case, weight = _fixed_case(), torch.randn(16, 8)
    expected, leaves = run(case, "reference", torch.float64), leaves_of(case)
    with torch.no_grad():
        out = (leaves["x"] @ weight.t())[:, None].clone()
    in_place(execution, case, out, leaves, weight).backward(case.grad[:, None])
    through_base = case.grad.double() @ weight.double()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert_equal_runs(gradients, {name: expected[name] for name in gradients} | {"x": expected["x"] + through_base})
