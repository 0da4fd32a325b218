"""Recipes: settings from YAML with file and line, checked, and written back whole."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from dylora_moe.config.continual import SKILL_KEYS
from dylora_moe.config.data import DATASET_KEYS
from dylora_moe.config.explain import allowed, words_of
from dylora_moe.config.generation import QUESTION_KEYS, GenerateConfig
from dylora_moe.config.names import (
    GENERATION,
    TRAINING,
    Kind,
    two_names,
    unknown_dataset_key,
    unknown_question_key,
    unknown_setting,
    unknown_skill_key,
    with_own_names,
)
from dylora_moe.config.remote import without_secrets
from dylora_moe.config.settings import RunConfig
from dylora_moe.config.spelling import did_you_mean, nearest
from dylora_moe.errors import ConfigError


def split_list(text: str) -> list[str]:
    """`a,b,c` as it is written in a flag -> its parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def load_recipe(path: Path, kind: Kind = TRAINING) -> dict[str, Any]:
    """The settings of a recipe file, checked for unknown names, not yet for values.

    Raises:
        ConfigError: no such file, no YAML mapping, a setting twice or unknown; with file, line and the nearest name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read as UTF-8 text: {error}.") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} must hold settings as `name: value` lines, got {type(values).__name__}.")
    _check_keys(path, root, kind.setting_named, lambda key: unknown_setting(key, kind))
    for key, entries in root.value:
        if key.value == "datasets":
            _check_datasets(path, entries)
        if key.value == "skills":
            for entry in _mappings(entries):
                _check_skill(path, entry)
        if key.value == "questions":
            for entry in _mappings(entries):
                _check_keys(path, entry, lambda key: key if key in QUESTION_KEYS else None, unknown_question_key)
    return with_own_names({str(name): value for name, value in values.items()}, where=str(path), kind=kind)


def _mappings(node: yaml.Node) -> list[yaml.MappingNode]:
    entries = node.value if isinstance(node, yaml.SequenceNode) else ()
    return [entry for entry in entries if isinstance(entry, yaml.MappingNode)]


def _check_datasets(path: Path, entries: yaml.Node) -> None:
    for entry in _mappings(entries):
        _check_keys(path, entry, lambda key: key if key in DATASET_KEYS else None, unknown_dataset_key)


def _check_skill(path: Path, entry: yaml.MappingNode) -> None:
    """A data set, or a mapping with a key of its own."""
    if not any(key.value in SKILL_KEYS for key, _ in entry.value):
        _check_keys(path, entry, lambda key: key if key in DATASET_KEYS else None, unknown_dataset_key)
        return
    _check_keys(path, entry, lambda key: key if key in SKILL_KEYS else None, unknown_skill_key)
    for key, value in entry.value:
        if key.value == "datasets":
            _check_datasets(path, value)


def _check_keys(
    path: Path, node: yaml.MappingNode, meant: Callable[[str], str | None], say: Callable[[str], str]
) -> None:
    seen: dict[str, str] = {}
    for key_node, _ in node.value:
        line, key = key_node.start_mark.line + 1, str(key_node.value)
        if key == "<<":  # YAML's own, for keys that stand elsewhere
            continue
        name = meant(key)
        if name is None:
            raise ConfigError(f"{path}:{line}: {say(key)}")
        if seen.get(name) == key:
            raise ConfigError(f"{path}:{line}: {key} stands here a second time. Keep one.")
        if name in seen:
            raise ConfigError(f"{path}:{line}: {two_names(seen[name], key)}")
        seen[name] = key


def make_config(values: Mapping[str, Any], *, where: str = "settings") -> RunConfig:
    """Settings -> a checked configuration.

    Raises:
        ConfigError: an unknown setting, a value out of range, or a combination that cannot work.
    """
    return cast(RunConfig, _make(values, where, TRAINING))


def make_generate_config(values: Mapping[str, Any], *, where: str = "settings") -> GenerateConfig:
    """Settings -> a checked generation.

    Raises:
        ConfigError: an unknown setting, a value out of range, or a combination that cannot work.
    """
    return cast(GenerateConfig, _make(values, where, GENERATION))


def _make(values: Mapping[str, Any], where: str, kind: Kind) -> BaseModel:
    named = with_own_names(values, where=where, kind=kind)
    try:
        return kind.settings(**named)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(error.errors(), named, kind))) from error


def _explain(problems: Iterable[Any], values: Mapping[str, Any], kind: Kind) -> list[str]:
    """One sentence for each setting that is wrong, however many of its types refused it."""
    told: dict[str, dict[str, str]] = {}
    for problem in problems:
        if not problem["loc"]:
            told.setdefault("", {})[str(problem)] = str(problem["ctx"]["error"])
            continue
        name, *path = problem["loc"]
        place, value = _place(values[name], path)
        must = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else f"must be {allowed(name, kind)}"
        got = without_secrets(repr(value))
        told.setdefault(name, {})[place] = f"{name} {must}, got {got}{place}{_meant(name, value, kind)}"
    for places in told.values():
        if len(places) > 1:  # of a wrong part and the whole, the part says more
            places.pop("", None)
    return [sentence for places in told.values() for sentence in places.values()]


def _meant(name: str, value: Any, kind: Kind) -> str:
    """The word of a setting that a mistyped one is nearest to, as a question; empty where there is none."""
    question = did_you_mean(nearest(value, words_of(name, kind))) if isinstance(value, str) else ""
    return f" ({question[0].lower()}{question[1:]})" if question else ""


def _place(value: Any, path: Iterable[int | str]) -> tuple[str, Any]:
    """Where in a setting's value a path leads, in words, and what is there; unions add words of their own to a path."""
    words = ""
    for part in path:
        if isinstance(value, Mapping) and part in value:
            words, value = f" for {part}", value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            words, value = f" in place {part + 1}", value[part]
    return words, value


def to_yaml(config: BaseModel) -> str:
    """All settings, resolved and complete, as a recipe that makes the same run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
