"""Names of settings: ours, other names for them, names that need none, and what an unknown name was meant to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from dylora_moe.config.continual import SKILL_KEYS
from dylora_moe.config.data import DATASET_KEYS
from dylora_moe.config.generation import QUESTION_KEYS, GenerateConfig
from dylora_moe.config.settings import RunConfig
from dylora_moe.config.spelling import did_you_mean, nearest, plain_name
from dylora_moe.errors import ConfigError

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "model": "base_model",
        "model_name_or_path": "base_model",
        "epochs": "num_epochs",
        "num_train_epochs": "num_epochs",
        "per_device_train_batch_size": "batch_size",
        "per_device_eval_batch_size": "eval_batch_size",
        "gradient_accumulation": "gradient_accumulation_steps",
        "lr_scheduler": "lr_scheduler_type",
        "max_seq_length": "max_length",
        "num_workers": "dataloader_num_workers",
        "pin_memory": "dataloader_pin_memory",
    }
)
"""Another name -> the setting. Source: the founding documents, transformers' TrainingArguments, TRL's SFTConfig."""

REPLACED: Mapping[str, str] = MappingProxyType(
    {
        "alpha": "Write lora_alpha.",
        "data_seed": "seed is that of the data, too: write seed.",
        "dropout": "Write lora_dropout.",
        "early_stopping": "Write early_stopping_patience, such as 3, and eval_steps.",
        "eval_strategy": "Write eval_steps: a number of steps, or epoch.",
        "evaluation_strategy": "Write eval_steps: a number of steps, or epoch.",
        "gpu_name": "Write {device} in run_name.",
        "greater_is_better": "metric_for_best_model is a loss, of which the lowest is best: leave it out.",
        "logging_strategy": "Write logging_steps: a number of steps.",
        "lr": "Write learning_rate.",
        "max_new_tokens": "Answers made while training have sample_tokens; `dylora chat` has --max-new-tokens.",
        "overwrite_output_dir": "A run is never overwritten: write another run_name.",
        "r": "Write lora_r.",
        "remove_unused_columns": "Rows hold nothing but what is trained on: leave it out.",
        "resume_from_checkpoint": "The same command again goes on by itself; for one checkpoint write resume: FOLDER.",
        "save_strategy": "Write save_steps: a number of steps, or epoch.",
        "warmup_steps": "Write warmup_ratio: a share of the steps.",
    }
)
"""A name that is known elsewhere and is no setting here -> what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of recipe.

    Attributes:
        verb: The command that takes it.
        settings: All of them.
        aliases: Another name -> the setting.
        replaced: A name known elsewhere that is no setting -> what to do instead.
    """

    verb: str
    settings: type[BaseModel]
    aliases: Mapping[str, str]
    replaced: Mapping[str, str]

    def setting_named(self, name: str) -> str | None:
        """The setting that a name, ours or another one, stands for; None if it stands for none."""
        return name if name in self.settings.model_fields else self.aliases.get(name)


TRAINING = Kind(verb="train", settings=RunConfig, aliases=ALIASES, replaced=REPLACED)
GENERATION = Kind(
    verb="generate",
    settings=GenerateConfig,
    aliases=MappingProxyType({}),
    replaced=MappingProxyType(
        {
            "api_key": "A key stands in no file: set the environment variable that api_key_variable names.",
            "base_url": "Write endpoints, a list of addresses.",
            "max_new_tokens": "Levels of the prompt pack have max_tokens.",
            "max_tokens": "Levels of the prompt pack have max_tokens.",
            "temperature": "Levels of the prompt pack have a temperature.",
        }
    ),
)
KINDS = (TRAINING, GENERATION)


def with_own_names(values: Mapping[str, Any], *, where: str = "settings", kind: Kind = TRAINING) -> dict[str, Any]:
    """The same settings, each under our name for it.

    Raises:
        ConfigError: a name of no setting, or two names of one.
    """
    named: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for name, value in values.items():
        setting = kind.setting_named(name)
        if setting is None:
            raise ConfigError(f"{where}: {unknown_setting(name, kind)}")
        if setting in named:
            raise ConfigError(f"{where}: {two_names(spelt[setting], name)}")
        named[setting], spelt[setting] = value, name
    return named


def two_names(first: str, second: str) -> str:
    """What to say about a setting that was given under two names."""
    return f"{first} and {second} are the same setting, got both. Keep one."


def unknown_setting(name: str, kind: Kind = TRAINING) -> str:
    """What to say about a setting that does not exist."""
    plain = plain_name(name)
    if plain in kind.replaced:
        return f"there is no setting {name!r}. {kind.replaced[plain]}"
    near = likely_settings(name, kind)
    for other in KINDS:
        if other is not kind and other.setting_named(plain):
            elsewhere = f"`dylora {other.verb}` has one: is this its recipe?"
            return f"there is no setting {name!r}. {did_you_mean(near)} {elsewhere}".replace(".  ", ". ")
    return f"there is no setting {name!r}. {did_you_mean(near) or '`dylora config explain` lists them all.'}"


def unknown_dataset_key(name: str) -> str:
    """What to say about a key of a `datasets` entry that does not exist."""
    hint = did_you_mean(nearest(name, DATASET_KEYS))
    text = f"a key of a datasets entry must be one of {', '.join(DATASET_KEYS)}, got {name!r}."
    return f"{text} {hint}" if hint else text


def unknown_skill_key(name: str) -> str:
    """What to say about a key of a `skills` entry that does not exist."""
    hint = did_you_mean(nearest(name, SKILL_KEYS))
    if name in DATASET_KEYS:
        hint = f"It says something of a data set: write datasets: [{{{name}: ...}}]."
    return f"a key of a skills entry must be one of {', '.join(SKILL_KEYS)}, got {name!r}. {hint}".strip()


def unknown_question_key(name: str) -> str:
    """What to say about a key of a `questions` entry that does not exist."""
    hint = did_you_mean(nearest(name, QUESTION_KEYS))
    return f"a key of a questions entry must be one of {', '.join(QUESTION_KEYS)}, got {name!r}. {hint}".strip()


def likely_settings(name: str, kind: Kind = TRAINING) -> list[str]:
    """The settings that a mistyped name is likely to mean: none, one, or two that are as near as each other."""
    near = nearest(name, [*kind.settings.model_fields, *kind.aliases])
    return list(dict.fromkeys(kind.aliases.get(found, found) for found in near))
