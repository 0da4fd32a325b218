"""The base's layers divided among processes (FSDP2): each keeps a part of every layer and gathers one when it runs.

What trains is small beside it and stays whole in every process, so that it is saved, packed and exported as ever;
its gradients are averaged here. Embeddings and head stay whole, too: the loss reads the head outside of any pass.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dylora_moe import ranks
from dylora_moe.tuner import DyLoraModel
from dylora_moe.tuner.inspect import decoder_layers
from dylora_moe.tuner.routed import RoutedLinear


def shard_base(model: DyLoraModel) -> None:
    """Divide the layers of a model's frozen base among all processes, in place."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (ranks.count(),))
    layers = decoder_layers(model.lm)[1]
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=_adapters(layer))
    outside = set(model.lm.parameters()) - {value for layer in layers for value in layer.parameters()}
    inside = {value for layer in layers for value in _adapters(layer)}
    fully_shard(model.lm.get_decoder(), mesh=mesh, ignored_params=outside | inside)
    # Accelerate would wrap it for DistributedDataParallel, which refuses a model in parts.
    model._is_accelerate_prepared = True  # type: ignore[assignment]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_base` divided it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def average_gradients(model: nn.Module) -> None:
    """Give what trains the mean of its gradients over all processes, in one exchange for each kind of number."""
    grads = [value.grad for value in model.parameters() if value.requires_grad and value.grad is not None]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        alike = [grad for grad in grads if grad.dtype == dtype]
        mean = ranks.total(torch.cat([grad.flatten() for grad in alike])) / ranks.count()
        for grad, part in zip(alike, mean.split([grad.numel() for grad in alike]), strict=True):
            grad.copy_(part.view_as(grad))


def _adapters(layer: nn.Module) -> set[nn.Parameter]:
    """Everything of the adapted Linears of a layer but the base's own weights."""
    found: set[nn.Parameter] = set()
    for module in layer.modules():
        if isinstance(module, RoutedLinear):
            found |= set(module.parameters()) - set(module.base_layer.parameters())
    return found
