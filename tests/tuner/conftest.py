"""Helpers of the tuner's tests: batches, losses, gradients, a loop over stock PEFT adapters, fresh processes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as StockLinear
from torch import Tensor

import dylora_moe.tuner
from dylora_moe.tuner import DyLoraModel, LoadWindow


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three rows of 12, 12 and 9 tokens with prompts of 3, 4 and 5; the last one padded on the right."""
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    labels = ids.clone()
    for row, length in enumerate((3, 4, 5)):
        labels[row, :length] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="session")
def full_loss() -> Callable[..., Tensor]:
    """(model, batch, window) -> language loss plus both auxiliary losses, of about the same size each."""

    def loss(model: DyLoraModel, batch: dict[str, Tensor], window: LoadWindow | None = None) -> Tensor:
        language = model(**batch).loss
        auxiliary = model.auxiliary_losses(window or LoadWindow())
        return language + auxiliary.balance + 0.5 * auxiliary.z

    return loss


@pytest.fixture(scope="session")
def gradients() -> Callable[[DyLoraModel], dict[str, Tensor]]:
    """Gradient of every trainable parameter, of experts under PEFT's names; one without a gradient fails the test."""

    def collect(model: DyLoraModel) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                found |= _by_expert(name, parameter.grad.clone(), model.expert_names)
        assert found
        return found

    return collect


def _by_expert(name: str, gradient: Tensor, experts: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of a run of packed experts, one by one."""
    packed = re.fullmatch(r"(.*)\.packed_([AB])\.run_(\d+)", name)
    if not packed:
        return {name: gradient}
    linear, factor, start = packed.groups()
    names = experts[int(start) :]
    return {f"{linear}.lora_{factor}.{n}.weight": one for n, one in zip(names, gradient, strict=False)}


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """(actual, expected, tolerance): the largest difference, relative to the largest expected value; dicts by key."""

    def check(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
        if isinstance(expected, dict):
            assert actual.keys() == expected.keys()
            for key in expected:
                error = _relative_error(actual[key], expected[key])
                assert error <= tolerance, f"{key}: relative error {error:.2e}"
            return
        error = _relative_error(actual, expected)
        assert error <= tolerance, f"relative error {error:.2e}"

    return check


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual - expected).abs().max() / largest).item()


@pytest.fixture(scope="session")
def make_loop(make_base: Callable[..., Any]) -> Callable[..., Any]:
    """(model, weights, architecture) -> a language model of stock PEFT adapters with the model's values.

    Every Linear adds up its adapters in an explicit loop; `weights(layer)` is their (tokens, experts) matrix.
    """

    def make(model: DyLoraModel, weights: Callable[[int], Tensor], architecture: str = "llama") -> Any:
        configs = {name: stock_config(model, name) for name in model.expert_names}
        first, *others = model.expert_names
        stock = get_peft_model(make_base(architecture), configs[first], adapter_name=first)
        for name in others:
            stock.add_adapter(name, configs[name])
        loop = stock.get_base_model()
        values = {key: value.clone() for key, value in model.lm.state_dict().items() if ".lora_" in key}
        assert not loop.load_state_dict(values, strict=False).unexpected_keys
        for name, parameter in loop.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        for name, linear in loop.named_modules():
            if isinstance(linear, StockLinear):
                assert type(linear) is StockLinear
                found = re.search(r"layers\.(\d+)\.", name)
                assert found
                linear.forward = partial(_looped, linear, model.expert_names, int(found[1]), weights)
        return loop

    return make


def stock_config(model: DyLoraModel, name: str) -> LoraConfig:
    """PEFT's configuration of an expert, without what makes its layers ours."""
    return LoraConfig(**model.peft_model.peft_config[name].to_dict())


def _looped(
    linear: StockLinear, names: tuple[str, ...], layer: int, weights: Callable[[int], Tensor], x: Tensor
) -> Tensor:
    out = linear.base_layer(x)
    for index, name in enumerate(names):
        if name in linear.lora_A:
            weight = weights(layer)[:, index].view(*x.shape[:-1], 1)
            out = out + weight * linear.lora_B[name](linear.lora_A[name](x)) * linear.scaling[name]
    return out


@pytest.fixture(scope="session")
def start_process() -> Callable[..., "subprocess.Popen[str]"]:
    """(code, *arguments) -> a new Python process that can import the package under test."""
    source = Path(dylora_moe.tuner.__file__).parents[2]

    def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
        environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def finish() -> Callable[..., None]:
    """(process, timeout in seconds) -> None once it ended well; fails with its error output."""

    def wait(process: "subprocess.Popen[str]", timeout_s: float = 180) -> None:
        try:
            _, errors = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert process.returncode == 0, errors[-4000:]

    return wait
