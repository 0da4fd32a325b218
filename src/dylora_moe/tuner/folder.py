"""A model's folder and its plain PEFT adapters on disk: written whole, read, checked and copied, without a model."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from dylora_moe.cache.disk import disk_full_error, is_disk_full
from dylora_moe.errors import TunerError

MODEL_FILE = "dylora_moe.json"
ROUTER_FILE = "router.safetensors"
EXPERTS_FOLDER = "experts"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FORMAT = 1
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


def read_description(folder: Path) -> dict[str, Any]:
    """The content of `dylora_moe.json`: format, base and its revision, routing, experts.

    Raises:
        TunerError: the folder holds no model, or one of a later format.
    """
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise TunerError(f"{folder} holds no {MODEL_FILE}, so it is no DyLoRA-MoE model. Give a run or a model folder.")
    description = _read_json(path)
    if description.get("format") != FORMAT:
        got = description.get("format")
        raise TunerError(f"{path} must have format {FORMAT} to be read by this version, got {got}. Update dylora-moe.")
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


def check_experts(model_folder: Path, wanted: Iterable[str]) -> None:
    """See that a model folder has experts of these names.

    Raises:
        TunerError: It has not.
    """
    names = [expert["name"] for expert in read_description(model_folder)["experts"]]
    for name in wanted:
        if name not in names:
            raise TunerError(f"there is no expert {name!r} in {model_folder}; there are {', '.join(names)}.")


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


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of a plain PEFT LoRA.

    Raises:
        TunerError: It is none, or is damaged.
    """
    return read_config(Path(folder)), load_weights(Path(folder))


def read_config(folder: Path) -> LoraConfig:
    """Configuration of a plain LoRA.

    Raises:
        TunerError: It is none, or is damaged.
    """
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


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of an adapter, by the names that PEFT gives them.

    Raises:
        TunerError: They are not there, damaged, or not finite.
    """
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TunerError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise TunerError(f"{path} must hold a JSON object, got {type(values).__name__}.")
    return values
