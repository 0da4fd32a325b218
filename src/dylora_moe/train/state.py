"""Weights, optimizer and random numbers, as files of tensors and JSON: no pickle, and back bit for bit."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylora_moe import ranks
from dylora_moe.errors import RunError
from dylora_moe.tuner import DyLoraModel

_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Something's state: tensors by name, and the rest of it as JSON has it."""

    tensors: Mapping[str, Tensor]
    record: Any


def save_weights(model: DyLoraModel, folder: Path) -> None:
    """What training changes: experts and router, bit for bit, as the optimizer has them."""
    save_file(_weights(model), folder / _WEIGHTS)


def load_weights(model: DyLoraModel, folder: Path) -> None:
    """Set what `save_weights` wrote.

    Raises:
        RunError: The model has other experts, ranks or targets.
    """
    saved, own = load_file(folder / _WEIGHTS), _weights(model)
    wrong = [name for name in saved.keys() | own.keys() if not _fits(saved.get(name), own.get(name))]
    if wrong:
        raise RunError(f"{folder} must hold the weights of this model, got others for {min(wrong)}.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])


def _weights(model: DyLoraModel) -> dict[str, Tensor]:
    """By name, sharing memory with the model."""
    found = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return found | {f"routers.{name}": value for name, value in model.routers.named_buffers()}


def _fits(saved: Tensor | None, own: Tensor | None) -> bool:
    return saved is not None and own is not None and (saved.shape, saved.dtype) == (own.shape, own.dtype)


def save_optimizer(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the tensors of an optimizer's state dict, and return the rest of it as JSON has it."""
    tensors = {
        f"{number}.{name}": value.contiguous() for number, of in state["state"].items() for name, value in of.items()
    }
    save_file(tensors, folder / _OPTIMIZER)
    return {"groups": state["param_groups"]}


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, record: Mapping[str, Any]) -> None:
    """Set what `save_optimizer` wrote."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / _OPTIMIZER).items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in record["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> Saved:
    """The state of the random numbers of Python, numpy and torch, on the CPU and on every GPU."""
    states = {"cpu": torch.get_rng_state()}
    states |= {f"cuda.{number}": torch.cuda.get_rng_state(index) for number, index in enumerate(_gpus())}
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    states["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return Saved(tensors=states, record={"python": random.getstate(), "numpy": [kind, place, has_gauss, gauss]})


def set_random_state(saved: Saved) -> None:
    """Draw on from what `random_state` gave."""
    states, record = saved.tensors, saved.record
    version, numbers, gauss = record["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, place, has_gauss, last = record["numpy"]
    np.random.set_state((kind, states["numpy"].numpy().astype(np.uint32), place, has_gauss, last))
    torch.set_rng_state(states["cpu"])
    for number, index in enumerate(_gpus()):
        torch.cuda.set_rng_state(states[f"cuda.{number}"], index)


def seed_rank(name: str) -> None:
    """Let this process draw from torch other numbers than the others do: for dropout of other rows."""
    digest = hashlib.sha256(f"{name}/{ranks.rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


def _gpus() -> Sequence[int]:
    """That this process draws random numbers on: its own, where there are several processes."""
    if not torch.cuda.is_available():
        return ()
    return range(torch.cuda.device_count()) if ranks.count() == 1 else [torch.cuda.current_device()]
