"""Settings that name files, made independent of the working directory."""

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dylora_moe.config import RunConfig
from dylora_moe.data.registry import DataSource, registry_of
from dylora_moe.data.sources import parse_dataset_spec
from dylora_moe.data.stream import is_pattern, is_skill_mapping


def with_full_paths(config: RunConfig) -> RunConfig:
    """The same run, readable from any working directory: files and folders of base and data by their full paths."""
    registry = registry_of(config.data_registry)
    datasets = [_with_full_path(dataset, registry) for dataset in config.datasets]
    skills = [_skill_with_full_paths(skill, registry) for skill in config.skills]
    own, template = config.data_registry, config.chat_template
    if isinstance(own, str):
        own = _full(own)
    elif own is not None:
        own = {n: {**entry, "path": _full(entry["path"])} if "path" in entry else entry for n, entry in own.items()}
    template = template if template in (None, "plain") else _full(template)
    base = config.base_model if config.base_model.startswith("pypi:") else _full(config.base_model)
    changed = {"datasets": tuple(datasets), "skills": tuple(skills), "data_registry": own, "base_model": base}
    return config.model_copy(update=changed | {"chat_template": template})


def _with_full_path(dataset: str | dict[str, Any], registry: Mapping[str, DataSource]) -> str | dict[str, Any]:
    path = parse_dataset_spec(dataset, registry).path
    if path is None:
        return dataset
    return _full(path) if isinstance(dataset, str) else {**dataset, "path": _full(path)}


def _skill_with_full_paths(skill: str | dict[str, Any], registry: Mapping[str, DataSource]) -> str | dict[str, Any]:
    if isinstance(skill, str) and is_pattern(skill):
        return str(Path(glob.escape(os.getcwd())) / Path(skill).expanduser())
    if isinstance(skill, str) or not is_skill_mapping(skill):
        return _with_full_path(skill, registry)
    if not isinstance(datasets := skill.get("datasets"), list | tuple):
        return skill  # to be refused where it is parsed
    full = {**skill, "datasets": [_with_full_path(dataset, registry) for dataset in datasets]}
    return full | {"adapter": _full(adapter)} if isinstance(adapter := skill.get("adapter"), str) else full


def _full(path: str) -> str:
    """The full path of what exists; a hub id, a word or a typo stays as it was written."""
    found = Path(path).expanduser()
    return str(found.absolute()) if path and found.exists() else path
