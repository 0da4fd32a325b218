"""torch.compile where it pays, and the reason where it does not."""

from collections.abc import Callable

from torch import nn

from dylora_moe.tuner import DyLoraModel
from dylora_moe.tuner.inspect import decoder_layers


def compile_layers(model: DyLoraModel, tell: Callable[[str], None]) -> None:
    """Compile the layers that gain from it, for batches of any length, or tell why there are none."""
    layers, reason = layers_to_compile(model, model.device.type)
    if reason:
        tell(f"torch_compile is skipped: {reason}")
    for layer in layers:
        layer.compile(dynamic=True)


def layers_to_compile(model: DyLoraModel, device: str) -> tuple[list[nn.Module], str | None]:
    """The layers below the tap, which carry no experts; or none, and why.

    Args:
        model: The mixture.
        device: Type of the device that it is on.
    """
    tap = model.routing_config.tap_layer
    if device != "cuda":
        # SmolLM2-135M, 15 of 30 layers compiled, one thread: 118 s to compile, steps as fast as before (docs/log.md).
        return [], "on a CPU it takes minutes to compile and steps were measured to be no faster."
    if tap == 0:
        return [], "only layers below the tap can be compiled, which do not depend on routing, and tap_layer is 0."
    return list(decoder_layers(model.lm)[1][:tap]), None
