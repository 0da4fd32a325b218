"""Finding one's way in a base model: its decoder layers, the Linears in them, and what a target setting matches."""

import re
from collections.abc import Collection

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from dylora_moe.errors import TunerError
from dylora_moe.tuner.config import ExpertConfig
from dylora_moe.tuner.routed import RoutedLinear

_ATTENTION_PARTS = ("attn", "attention")
_PEFT_WORDS = {"default", "base_layer", *LoraLayer.adapter_layer_names, *LoraLayer.other_param_names}


def decoder_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name in the model, such as `model.layers`.

    Raises:
        TunerError: there is no ModuleList as long as the config's num_hidden_layers.
    """
    count = base.config.get_text_config().num_hidden_layers
    decoder = base.get_decoder()
    for name, module in base.named_modules():
        is_inside = any(module is child for child in decoder.modules())
        if isinstance(module, nn.ModuleList) and len(module) == count and is_inside:
            return name, module
    raise TunerError(
        f"the base must be a decoder with a list of {count} layers, and {type(base).__name__} has none. "
        "Llama, Qwen, Gemma, Mistral and Phi models are known to work."
    )


def linear_names(layers: nn.ModuleList) -> dict[str, str]:
    """Name of each Linear inside the layers -> its last part; Linears of the experts themselves left out."""
    names: dict[str, str] = {}
    adapted: list[str] = []
    for name, module in layers.named_modules():
        if any(name.startswith(prefix) for prefix in adapted):
            continue
        if isinstance(module, RoutedLinear):
            adapted.append(name + ".")
        if isinstance(module, nn.Linear | RoutedLinear):
            names[name] = name.rpartition(".")[2]
    return names


def resolve_targets(base: PreTrainedModel, targets: str | tuple[str, ...] | list[str]) -> list[str]:
    """A target setting -> last parts of Linear names, sorted.

    Args:
        base: the language model, adapted already or not.
        targets: `all-linear`, `attention`, or a list of last parts such as `q_proj`.

    Raises:
        TunerError: a name matches no Linear; the message lists those that exist.
    """
    names = linear_names(decoder_layers(base)[1])
    known = sorted(set(names.values()))
    if not known:
        raise TunerError(f"the layers of {type(base).__name__} hold no Linear that an expert could adapt.")
    if targets == "all-linear":
        return known
    if targets == "attention":
        found = {last for name, last in names.items() if any(part in name.lower() for part in _ATTENTION_PARTS)}
        if not found:
            raise TunerError(f"target_modules=attention matches no Linear of this base; there are {', '.join(known)}.")
        return sorted(found)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        raise TunerError(
            f"target_modules must name Linears of this base, got {', '.join(missing) or 'an empty list'}; "
            f"there are {', '.join(known)}, or the words all-linear and attention."
        )
    return sorted(set(wanted))


def layer_index(layers_path: str, name: str) -> int | None:
    """Index of the decoder layer that a module is inside of, by its name in the model; None outside all layers."""
    if not name.startswith(layers_path + "."):
        return None
    return int(name.removeprefix(layers_path + ".").partition(".")[0])


def check_reach(base: PreTrainedModel, config: LoraConfig, tap_layer: int) -> list[str]:
    """Names of the Linears that an adapter changes, which must be some, all in layers from the tap up.

    Raises:
        TunerError: it matches nothing, something that is no Linear, or something the router cannot decide for.
    """
    path, _ = decoder_layers(base)
    if config.target_modules == "all-linear":
        config.target_modules = resolve_targets(base, "all-linear")
    adapted = tuple(name + "." for name, module in base.named_modules() if isinstance(module, RoutedLinear))
    reached = [
        (name, module)
        for name, module in base.named_modules()
        if not name.startswith(adapted) and check_target_module_exists(config, name)
    ]
    if not reached:
        known = ", ".join(resolve_targets(base, "all-linear"))
        raise TunerError(f"target_modules {config.target_modules} match nothing in this base; its Linears are {known}.")
    for name, module in reached:
        index = layer_index(path, name)
        if index is None or not isinstance(module, nn.Linear | RoutedLinear):
            raise TunerError(
                f"experts can adapt Linears inside {path} only, this one adapts {name}. Retrain it without."
            )
        if index < tap_layer:
            raise TunerError(
                f"the expert adapts layer {index}, below tap_layer={tap_layer}, where the router has not decided yet. "
                "Build the model with tap_layer=0."
            )
    return [name for name, _ in reached]


def check_name(base: PreTrainedModel, name: str, taken: Collection[str]) -> None:
    """An expert's name is a folder, a key of an nn.ModuleDict, and a part of parameter names that PEFT searches.

    Raises:
        TunerError: it is taken, or cannot be all of that.
    """
    if name in taken:
        raise TunerError(f"expert names must be different, got {name!r} twice.")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) or hasattr(nn.ModuleDict(), name):
        raise TunerError(
            f"an expert name must begin with a letter, hold only letters, digits, - and _, and be no attribute of "
            f"nn.ModuleDict, got {name!r}."
        )
    parts = {part for module, _ in base.named_modules() for part in module.split(".")}
    if name in parts or name in _PEFT_WORDS:
        # PEFT picks an adapter's weights by the substring ".{name}." in parameter names.
        raise TunerError(f"expert name {name!r} is also the name of a module of the base. Choose another.")


def lora_config(base: PreTrainedModel, expert: ExpertConfig, tap_layer: int) -> LoraConfig:
    """PEFT's configuration of a plain LoRA over the layers from the tap up."""
    path, layers = decoder_layers(base)
    return LoraConfig(
        r=expert.rank,
        lora_alpha=expert.alpha,  # type: ignore[arg-type]
        lora_dropout=expert.dropout,
        use_rslora=expert.use_rslora,
        target_modules=resolve_targets(base, expert.target_modules),
        layers_to_transform=list(range(tap_layer, len(layers))) if tap_layer else None,
        layers_pattern=path.rpartition(".")[2] if tap_layer else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
