"""Settings of a run: declared once, documented under their field, read from recipes and flags."""

from dylora_moe.config.advice import Advice
from dylora_moe.config.continual import SKILL_KEYS, SkillSpec
from dylora_moe.config.data import DATASET_KEYS, DatasetSpec
from dylora_moe.config.explain import Explanation, explain, explain_all, remarks
from dylora_moe.config.generation import KEEP_ANSWERS, QUESTION_KEYS, GenerateConfig
from dylora_moe.config.names import (
    ALIASES,
    GENERATION,
    TRAINING,
    Kind,
    unknown_dataset_key,
    unknown_setting,
    unknown_skill_key,
    with_own_names,
)
from dylora_moe.config.recipe import load_recipe, make_config, make_generate_config, split_list, to_yaml
from dylora_moe.config.settings import RunConfig

__all__ = [
    "ALIASES",
    "DATASET_KEYS",
    "GENERATION",
    "KEEP_ANSWERS",
    "QUESTION_KEYS",
    "SKILL_KEYS",
    "TRAINING",
    "Advice",
    "DatasetSpec",
    "Explanation",
    "GenerateConfig",
    "Kind",
    "RunConfig",
    "SkillSpec",
    "explain",
    "explain_all",
    "load_recipe",
    "make_config",
    "make_generate_config",
    "remarks",
    "split_list",
    "to_yaml",
    "unknown_dataset_key",
    "unknown_setting",
    "unknown_skill_key",
    "with_own_names",
]
