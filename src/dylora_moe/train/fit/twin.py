"""A twin of a mixture: the same modules over tensors that have shapes and no memory, and only a few of its layers.

Layers that are alike need the same memory, so of those that follow each other one stands for all.
"""

import warnings
from collections.abc import Hashable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from dylora_moe.tuner import DyLoraModel
from dylora_moe.tuner.inspect import decoder_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a twin has otherwise than its model; None is as there."""

    num_experts: int | None = None
    rank: int | None = None
    tap_layer: int | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A layer of the twin: its index in the model, and how many layers of the model it stands for, itself included."""

    index: int
    stands_for: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """Made by `make_twin`; tensors of its passes are made inside `mode`."""

    model: DyLoraModel
    mode: FakeTensorMode
    kept: tuple[Kept, ...]
    device: torch.device

    @property
    def layers(self) -> nn.ModuleList:
        """Its decoder layers, as many as `kept`."""
        return decoder_layers(self.model.lm)[1]


def make_twin(model: DyLoraModel, changes: Changes | None = None) -> Twin:
    """The model's twin, in training mode. The base is never quantised: an estimate counts its own bytes anyway."""
    changes = changes or Changes()
    tap = model.routing_config.tap_layer if changes.tap_layer is None else changes.tap_layer
    kept = choose_layers(layer_kinds(model.lm), tap)
    mode = FakeTensorMode()
    with torch.device("meta"):
        base = _base(model.lm, changes.dtype or model.lm.dtype, [layer.index for layer in kept])
        twin = _experts(model, base, changes, tap, kept)
        for expert in model.experts[: len(twin.experts)]:
            twin.set_maturity(expert.name, expert.maturity)
            if expert.frozen:
                twin.freeze_expert(expert.name)
    with mode, warnings.catch_warnings():
        # The packed factors ask where their memory lies, which for these is nowhere.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        _fill(twin, model.device)
        first = twin.experts[0]
        twin.freeze_expert(first.name, frozen=first.frozen)  # as it is; what this does is to pack the experts anew
    return Twin(model=twin.train(), mode=mode, kept=tuple(kept), device=model.device)


def layer_kinds(lm: PreTrainedModel) -> list[Hashable]:
    """For each decoder layer what is equal for layers that are alike."""
    layers = decoder_layers(lm)[1]
    types = getattr(lm.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    shapes = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers]
    return list(zip(types, shapes, strict=True))


def choose_layers(kinds: Sequence[Hashable], tap: int) -> list[Kept]:
    """The layers that a twin has: the last below the tap, the first and last above, and between one of each kind.

    Layers below the tap keep nothing for backward, so one of them stands for itself only.
    """
    middle: dict[Hashable, list[int]] = {}
    for index in range(tap + 1, len(kinds) - 1):
        middle.setdefault(kinds[index], []).append(index)
    ends = [Kept(index=index, stands_for=1) for index in {tap - 1, tap, len(kinds) - 1} if index >= 0]
    between = [Kept(index=alike[0], stands_for=len(alike)) for alike in middle.values()]
    return sorted(ends + between, key=lambda layer: layer.index)


def _base(lm: PreTrainedModel, dtype: torch.dtype, indices: Sequence[int]) -> PreTrainedModel:
    config = deepcopy(lm.config)
    vars(config).pop("quantization_config", None)
    base = type(lm)._from_config(config, dtype=dtype)
    layers, text = decoder_layers(base)[1], config.get_text_config()
    count, chosen = len(layers), [layers[index] for index in indices]
    del layers[:]
    layers.extend(chosen)
    for name, value in list(vars(text).items()):  # such as layer_types
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, [value[index] for index in indices])
    text.num_hidden_layers = len(indices)
    return base


def _experts(
    model: DyLoraModel, base: PreTrainedModel, changes: Changes, tap: int, kept: Sequence[Kept]
) -> DyLoraModel:
    names = model.expert_names[: changes.num_experts]
    below = sum(layer.index < tap for layer in kept)
    configs = []
    for name in names:
        config = copy(cast(LoraConfig, model.peft_model.peft_config[name]))
        config.r = changes.rank or config.r
        if config.layers_to_transform is not None or below:
            wanted = config.layers_to_transform
            reached = range(len(kept)) if wanted is None else wanted if isinstance(wanted, list) else [wanted]
            config.layers_to_transform = [
                place
                for place, layer in enumerate(kept)
                if layer.index >= tap and (wanted is None or layer.index in reached)
            ]
            config.layers_pattern = config.layers_pattern or _last_part(base)
        configs.append(config)
    routing = replace(model.routing_config, tap_layer=below, top_k=min(model.routing_config.top_k, len(names)))
    return DyLoraModel(base, names, routing=routing, peft_configs=configs)


def _last_part(base: PreTrainedModel) -> str:
    return decoder_layers(base)[0].rpartition(".")[2]


def _fill(twin: DyLoraModel, device: torch.device) -> None:
    """Give every parameter and buffer a device, still without memory; those that are tied stay so."""
    made: dict[int, Tensor] = {}
    for module in twin.modules():
        for table in (module._parameters, module._buffers):
            held = cast(dict[str, Any], table)
            for name, value in held.items():
                if value is None:
                    continue
                if id(value) not in made:
                    blank = torch.empty(value.shape, dtype=value.dtype, device=device)
                    is_parameter = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(blank, value.requires_grad) if is_parameter else blank
                held[name] = made[id(value)]
