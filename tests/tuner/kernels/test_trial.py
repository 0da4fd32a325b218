"""Before kernels serve by themselves they are tried against another execution: right ones pass, wrong ones do not."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.tuner import kernels
from dylora_moe.tuner.kernels.machine import passes_trial
from dylora_moe.tuner.kernels.trial import are_alike

CPU = torch.device("cpu")


def with_gradient(change: Callable[[Tensor], Tensor], argument: int) -> Callable[..., Tensor]:
    """`grouped`, the gradient of one argument changed."""

    def compute(*args: Any) -> Tensor:
        given = list(args)
        given[argument] = args[argument].view_as(args[argument])
        given[argument].register_hook(change)
        return kernels.grouped(*given)

    return compute


def wrong_output(*args: Any) -> Tensor:
    return kernels.grouped(*args) * 1.001


def missing_slot(*args: Any) -> Tensor:
    keep = torch.ones_like(args[2])
    keep[7] = 0.0
    return kernels.grouped(*args[:2], args[2] * keep, *args[3:])


def fails(*args: Any) -> Tensor:
    raise RuntimeError("no such device function")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_execution_is_like_itself_and_draws_nothing(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert are_alike(kernels.grouped, kernels.grouped, device=CPU, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        wrong_output,
        missing_slot,
        *(with_gradient(lambda grad: grad * 1.001, argument) for argument in (1, 2, 3, 4)),
        with_gradient(lambda grad: grad * float("nan"), 3),
    ],
)
def test_wrong_numbers_do_not_pass(wrong: Callable[..., Tensor]) -> None:
    assert not are_alike(wrong, kernels.grouped, device=CPU, dtype=torch.float32)


def test_what_fails_is_told_once_and_left_aside(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not any(passes_trial(fails, kernels.grouped, CPU, torch.float32) for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        "the Triton kernels are left aside on cpu in torch.float32: RuntimeError: no such device function"
    ]
    assert passes_trial(kernels.grouped, kernels.grouped, CPU, torch.float32)
