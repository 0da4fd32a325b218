"""Models and experts in and out of memory: our folder, and plain PEFT adapters."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dylora_moe.errors import TunerError
from dylora_moe.tuner.config import RoutingConfig
from dylora_moe.tuner.folder import (
    ADAPTER_WEIGHTS,
    EXPERTS_FOLDER,
    FORMAT,
    MODEL_FILE,
    ROUTER_FILE,
    load_weights,
    read_adapter,
    read_config,
    read_description,
    written_whole,
)
from dylora_moe.tuner.inspect import check_reach
from dylora_moe.tuner.model import DyLoraModel


def save_model(
    model: DyLoraModel, folder: Path, *, base_name: str, base_revision: str | None = None, tokenizer: Any = None
) -> None:
    """Write the mixture: `dylora_moe.json`, the router, one plain PEFT adapter an expert, and the tokenizer.

    Args:
        model: What to write.
        folder: New or empty.
        base_name: Base that the mixture was trained on: a hub id, a folder, or an embedded base.
        base_revision: Its revision, as `bases.ResolvedBase` has it, for whoever loads the mixture.
        tokenizer: Of the base, with the chat template that was trained with.

    Raises:
        TunerError: the folder exists and is not empty.
    """
    with written_whole(Path(folder)) as target:
        for name in model.expert_names:
            _write_adapter(model, name, target / EXPERTS_FOLDER / name, base_name)
        routers = {key: value.contiguous() for key, value in model.routers.state_dict().items()}
        if routers:
            save_file(routers, target / ROUTER_FILE)
        description = {
            "format": FORMAT,
            "base": base_name,
            "base_revision": base_revision,
            "routing": model.routing_config.to_json(),
            "experts": [asdict(expert) for expert in model.experts],
        }
        (target / MODEL_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def load_model(base: PreTrainedModel, folder: Path) -> DyLoraModel:
    """Read what `save_model` wrote onto the base it was trained on; the base is changed in place.

    Raises:
        TunerError: no model in the folder, or one whose weights do not fit this base.
    """
    folder = Path(folder)
    description = read_description(folder)
    adapters = {expert["name"]: folder / EXPERTS_FOLDER / expert["name"] for expert in description["experts"]}
    model = mixture_of(base, adapters, RoutingConfig.from_json(description["routing"]))
    for expert in description["experts"]:
        model.set_maturity(expert["name"], expert["maturity"])
        if expert["frozen"]:
            model.freeze_expert(expert["name"])
    if model.routers:
        try:
            model.routers.load_state_dict(load_file(folder / ROUTER_FILE, device=str(model.device)))
        except Exception as error:  # a missing, broken or unfitting file: each library has its own kind
            raise TunerError(f"{folder / ROUTER_FILE} cannot be read into this model: {error}") from error
    return model.eval()


def mixture_of(base: PreTrainedModel, adapters: Mapping[str, Path], routing: RoutingConfig) -> DyLoraModel:
    """A mixture of plain PEFT LoRAs, of any ranks and targets, with a router that knows nothing yet.

    Args:
        base: Changed in place.
        adapters: Name -> folder, in the router's order.
        routing: Of the mixture.

    Raises:
        TunerError: one is no plain LoRA, adapts what lies below the tap, or does not fit the base.
    """
    configs = [read_config(folder) for folder in adapters.values()]
    model = DyLoraModel(base, list(adapters), routing=routing, peft_configs=configs)
    for (name, folder), config in zip(adapters.items(), configs, strict=True):
        weights = load_weights(folder)
        _check_shapes(model, config, weights, folder)
        _set_weights(model, name, weights, folder)
    return model.eval()


def export_expert(model: DyLoraModel, name: str, folder: Path, *, base_name: str) -> None:
    """Write one expert as a plain PEFT LoRA adapter, for any program that reads those.

    Raises:
        TunerError: no such expert, or the folder exists and is not empty.
    """
    if name not in model.expert_names:
        raise TunerError(f"there is no expert {name!r}; there are {', '.join(model.expert_names)}.")
    with written_whole(Path(folder)) as target:
        _write_adapter(model, name, target, base_name)


def import_expert(model: DyLoraModel, folder: Path, name: str) -> None:
    """Add a plain PEFT LoRA adapter, of any rank and targets, as a mature expert.

    Raises:
        TunerError: it is no plain LoRA (another method, DoRA, biases, modules saved whole), adapts what lies below
            the tap, or does not fit the base. The model is then as it was.
    """
    config, weights = _read_adapter(model, Path(folder))
    model.add_expert(name, peft_config=config, maturity=1.0)
    _set_weights(model, name, weights, folder)


def check_adapter(model: DyLoraModel, folder: Path) -> str | None:
    """See that `import_expert` can take an adapter in; gives the base that it names, if it does.

    Raises:
        TunerError: It cannot.
    """
    config, _ = _read_adapter(model, Path(folder))
    return config.base_model_name_or_path


def _read_adapter(model: DyLoraModel, folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    config, weights = read_adapter(folder)
    _check_shapes(model, config, weights, folder)
    return config, weights


def _check_shapes(model: DyLoraModel, config: LoraConfig, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """See to it that the weights are the two factors of every Linear that the adapter reaches, and fit them."""
    expected: dict[str, tuple[int, int]] = {}
    for name in check_reach(model.lm, config, model.routing_config.tap_layer):
        linear: Any = model.lm.get_submodule(name)
        expected[f"base_model.model.{name}.lora_A.weight"] = (config.r, linear.in_features)
        expected[f"base_model.model.{name}.lora_B.weight"] = (linear.out_features, config.r)
    got = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key)]
    if wrong:
        key = min(wrong)
        raise TunerError(
            f"the weights in {folder} must fit this base: {key} has shape {got.get(key)} there and {expected.get(key)} "
            f"here, and so on for {len(wrong)} of them. Is it from another base?"
        )


def _write_adapter(model: DyLoraModel, name: str, folder: Path, base_name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prefix_a, prefix_b = f".lora_A.{name}.weight", f".lora_B.{name}.weight"
    weights = {
        f"base_model.model.{key.replace(f'.{name}.weight', '.weight')}": value.detach().cpu().contiguous().clone()
        for key, value in model.lm.state_dict().items()
        if key.endswith((prefix_a, prefix_b))
    }
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(**model.peft_model.peft_config[name].to_dict())
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # type: ignore[assignment]  # a set is written in any order
    config.save_pretrained(str(folder))


def _set_weights(model: DyLoraModel, name: str, weights: dict[str, torch.Tensor], folder: Path) -> None:
    try:
        report = set_peft_model_state_dict(model.peft_model, weights, adapter_name=name)
    except Exception as error:  # peft and torch raise their own kinds; all mean the weights do not fit
        raise TunerError(f"the weights in {folder} do not fit this base: {error}") from error
    wanted = [key for key in model.lm.state_dict() if f".{name}." in key]
    if report.unexpected_keys or len(weights) != len(wanted):
        raise TunerError(
            f"{folder} holds {len(weights)} weights where this base takes {len(wanted)} "
            f"(unknown: {report.unexpected_keys[:3]}). Is it from another base?"
        )
