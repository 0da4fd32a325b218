"""Models and experts on disk: our folder, and plain PEFT adapters in and out."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dylora_moe.cache.disk import disk_full_error, is_disk_full
from dylora_moe.errors import TunerError
from dylora_moe.tuner.config import RoutingConfig
from dylora_moe.tuner.inspect import check_reach
from dylora_moe.tuner.model import DyLoraModel

MODEL_FILE = "dylora_moe.json"
ROUTER_FILE = "router.safetensors"
EXPERTS_FOLDER = "experts"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FORMAT = 1
# By name, since a model folder may also hold what its owner keeps there.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

# Fields of PEFT's LoraConfig that leave a LoRA plain, whatever their value; all others must be at their defaults.
_PLAIN_LORA = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes otherwise.

    An empty folder that is there is filled: it may be the one that one works in, a link, or another disk.

    Raises:
        TunerError: `folder` exists and is not empty; nothing is ever overwritten.
        CacheError: The disk is full.
    """
    check_new(folder)
    is_there = folder.is_dir()
    if not is_there:
        folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder if is_there else folder.parent))
    try:
        yield temporary
        if is_there:
            for path in temporary.iterdir():
                os.replace(path, folder / path.name)
        else:
            temporary.chmod(0o755)
            os.replace(temporary, folder)
    except Exception as error:
        if is_disk_full(error):
            raise disk_full_error(folder.parent, f"Writing {folder}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(folder: Path) -> None:
    """See that a folder can be written: for long work, before it begins.

    Raises:
        TunerError: It exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TunerError(f"the folder to write must be new or empty, {folder} is not. Choose another.")


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
            "format": _FORMAT,
            "base": base_name,
            "base_revision": base_revision,
            "routing": model.routing_config.to_json(),
            "experts": [asdict(expert) for expert in model.experts],
        }
        (target / MODEL_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def read_description(folder: Path) -> dict[str, Any]:
    """The content of `dylora_moe.json`: format, base and its revision, routing, experts.

    Raises:
        TunerError: the folder holds no model, or one of a later format.
    """
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise TunerError(f"{folder} holds no {MODEL_FILE}, so it is no DyLoRA-MoE model. Give a run or a model folder.")
    description = _read_json(path)
    if description.get("format") != _FORMAT:
        got = description.get("format")
        raise TunerError(f"{path} must have format {_FORMAT} to be read by this version, got {got}. Update dylora-moe.")
    _check_description(description, path)
    return description


def _check_description(description: dict[str, Any], path: Path) -> None:
    """What a model from elsewhere may lack, and what is joined to paths, read and written."""
    kinds = {"base": str, "base_revision": str | None, "routing": dict, "experts": list}
    for key, kind in kinds.items():
        if not isinstance(description.get(key), kind):
            raise TunerError(f"{path} must tell {key}, got {description.get(key)!r}. Copy the model again.")
    experts = description["experts"]
    for expert in experts:
        name = expert.get("name") if isinstance(expert, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            raise TunerError(f"{path} must name experts by letters, digits, - and _, got {name!r}.")
        if not isinstance(expert.get("maturity"), int | float) or not isinstance(expert.get("frozen"), bool):
            raise TunerError(f"{path} must tell maturity and frozen of {name}, got {expert}. Copy the model again.")
    if not experts:
        raise TunerError(f"{path} must name at least one expert, got none. Copy the model again.")


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
    configs = [_read_config(folder) for folder in adapters.values()]
    model = DyLoraModel(base, list(adapters), routing=routing, peft_configs=configs)
    for (name, folder), config in zip(adapters.items(), configs, strict=True):
        weights = _load_weights(folder)
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


def copy_expert(model_folder: Path, name: str, folder: Path) -> None:
    """Copy one expert out of a model folder, where it is a plain PEFT adapter already; no base is needed.

    The tokenizer, with the chat template that was trained with, comes beside it.

    Raises:
        TunerError: no such expert, or the folder to write exists and is not empty.
    """
    check_experts(model_folder, [name])
    with written_whole(Path(folder)) as target:
        write_copy(model_folder, name, target)


def write_copy(model_folder: Path, name: str, target: Path) -> None:
    """What `copy_expert` writes, into a folder that is there or not.

    Raises:
        TunerError: The expert is damaged.
    """
    copy_adapter(model_folder, name, target)
    copy_tokenizer(model_folder, target)


def copy_adapter(model_folder: Path, name: str, target: Path) -> None:
    """Copy the two files of an expert, read once on the way: nothing damaged is handed on.

    Raises:
        TunerError: They are no plain LoRA, or damaged.
    """
    source = Path(model_folder) / EXPERTS_FOLDER / name
    read_adapter(source)
    target.mkdir(parents=True, exist_ok=True)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(source / file, target / file)


def copy_tokenizer(model_folder: Path, target: Path) -> None:
    """Copy the files of the tokenizer, its chat template among them, out of a model folder."""
    for name in _TOKENIZER_FILES:
        if (path := Path(model_folder) / name).is_file():
            shutil.copyfile(path, target / name)


def check_experts(model_folder: Path, wanted: Iterable[str]) -> None:
    """See that a model folder has experts of these names.

    Raises:
        TunerError: It has not.
    """
    names = [expert["name"] for expert in read_description(model_folder)["experts"]]
    for name in wanted:
        if name not in names:
            raise TunerError(f"there is no expert {name!r} in {model_folder}; there are {', '.join(names)}.")


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of a plain PEFT LoRA.

    Raises:
        TunerError: It is none, or is damaged.
    """
    return _read_config(Path(folder)), _load_weights(Path(folder))


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


def _read_config(folder: Path) -> LoraConfig:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise TunerError(f"{folder} holds no adapter_config.json, so it is no PEFT adapter.")
    values = _read_json(path)
    if values.get("peft_type") != "LORA":
        raise TunerError(f"an expert must be a LORA adapter, {path} is of type {values.get('peft_type')}.")
    plain = LoraConfig().to_dict()
    extra = [key for key, value in values.items() if key not in _PLAIN_LORA and value and value != plain.get(key)]
    if extra:
        raise TunerError(
            f"an expert must be a plain LoRA, {path} sets {', '.join(extra)}. Merge it or retrain without."
        )
    if not isinstance(values.get("r"), int) or not isinstance(values.get("lora_alpha"), int | float):
        raise TunerError(f"{path} must give r and lora_alpha as numbers. Is the file damaged?")
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.init_lora_weights = True
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TunerError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise TunerError(f"{path} must hold a JSON object, got {type(values).__name__}.")
    return values


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise TunerError(f"{folder} holds no {ADAPTER_WEIGHTS}; weights in pickle files are not read.")
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own kinds; all mean the file is damaged
        raise TunerError(f"{path} cannot be read: {error}") from error
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise TunerError(f"{path} holds values that are not finite.")
    return weights


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
