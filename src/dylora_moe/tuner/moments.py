"""An optimizer that goes on while experts are added, frozen or removed: each keeps its moments."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dylora_moe.errors import TunerError
from dylora_moe.tuner.model import DyLoraModel
from dylora_moe.tuner.router import LinearRouter

_Key: TypeAlias = tuple[str, str]
"""(a factor of a Linear or a router, an expert): what one expert has there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Where a key lies: a parameter, and its place along the first dimension; None for all of it."""

    parameter: nn.Parameter
    place: int | None

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.place is None else tensor[self.place]


@contextmanager
def moments_kept(model: DyLoraModel, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block experts may be added, frozen and removed; at its end the optimizer has what trains then.

    Moments stay with the experts that they are of, wherever these lie, and settings with the groups: what is new goes
    to the group of its kind, experts or router. An expert that is new, or that trains again, begins without moments.
    Where it shares a parameter with others that train (experts of one rank do), it shares their count of steps, too:
    its second moments are then the mean of theirs, since zeros without their correction would make its first steps
    about three times too long.

    Args:
        model: Whose experts change.
        optimizer: Over parameters of the model; all of its states are of a parameter's shape, or single numbers.

    Raises:
        TunerError: The optimizer knows no parameter of the model, or has states of another shape.
    """
    before = _parts(model)
    group_of = {id(value): number for number, group in enumerate(optimizer.param_groups) for value in group["params"]}
    groups: dict[bool, int] = {}
    states: dict[_Key, dict[str, Any]] = {}
    known = {id(part.parameter) for part in before.values()}
    for key, part in before.items():
        if id(part.parameter) not in group_of:
            continue
        groups.setdefault(_is_router(key), group_of[id(part.parameter)])
        states[key] = _read(part, optimizer.state.get(part.parameter, {}))
    if not groups:
        raise TunerError("the optimizer must be over parameters of this model, and it knows none of them.")
    try:
        yield
    finally:
        _hand_over(model, optimizer, known, groups, {_is_router(key) for key in before}, states)


def _hand_over(
    model: DyLoraModel,
    optimizer: torch.optim.Optimizer,
    known: set[int],
    groups: dict[bool, int],
    kinds: set[bool],
    states: dict[_Key, dict[str, Any]],
) -> None:
    """Give the optimizer what trains now; kinds that were there, and were another optimizer's, stay with that one."""
    after: dict[int, tuple[nn.Parameter, list[tuple[_Key, _Part]]]] = {}
    for key, part in _parts(model).items():
        after.setdefault(id(part.parameter), (part.parameter, []))[1].append((key, part))
    for group in optimizer.param_groups:
        for value in group["params"]:
            if id(value) in known:
                optimizer.state.pop(value, None)
        group["params"] = [value for value in group["params"] if id(value) not in known]
    for parameter, parts in after.values():
        kind = _is_router(parts[0][0])
        if kind in kinds and kind not in groups:
            continue
        number = groups.get(kind, next(iter(groups.values())))
        optimizer.param_groups[number]["params"].append(parameter)
        if state := _joined(parameter, parts, states):
            optimizer.state[parameter] = state


def _is_router(key: _Key) -> bool:
    return key[0].startswith("routers.")


def _parts(model: DyLoraModel) -> dict[_Key, _Part]:
    """All that trains of experts and linear routers, in the order of the model."""
    found: dict[_Key, _Part] = {}
    for name, linear in model.routed_linears():
        for expert in model.expert_names:
            for factor, (parameter, place) in linear.trained_parts(expert).items():
                found[f"{name}.{factor}", expert] = _Part(parameter=parameter, place=place)
    for name, router in model.routers.items():
        if isinstance(router, LinearRouter) and router.weight.requires_grad:
            for place, expert in enumerate(model.expert_names):
                found[f"routers.{name}", expert] = _Part(parameter=router.weight, place=place)
    return found


def _read(part: _Part, state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            if value.shape != part.parameter.shape:
                raise TunerError(
                    f"an optimizer's states must have the shapes of its parameters, and {name} has "
                    f"{tuple(value.shape)} for {tuple(part.parameter.shape)}. Take one of torch's own."
                )
            found[name] = part.of(value).clone()
        else:
            found[name] = value.clone() if isinstance(value, Tensor) else value
    return found


def _joined(
    parameter: nn.Parameter, parts: list[tuple[_Key, _Part]], states: dict[_Key, dict[str, Any]]
) -> dict[str, Any]:
    """The state of a parameter from those of what lies in it."""
    known: defaultdict[str, list[tuple[_Part, Any]]] = defaultdict(list)
    for key, part in parts:
        for name, value in states.get(key, {}).items():
            known[name].append((part, value))
    joined: dict[str, Any] = {}
    for name, values in known.items():
        first = values[0][1]
        if not (isinstance(first, Tensor) and first.dim()):
            joined[name] = max((value for _, value in values), key=float)
            continue
        moment = torch.zeros_like(parameter, dtype=first.dtype, device=first.device)
        if name.endswith("_sq"):
            moment += torch.stack([value for _, value in values]).mean(0)
        for part, value in values:
            part.of(moment).copy_(value)
        joined[name] = moment
    return joined
