"""Settings: described, checked one by one and together, read from recipes with file and line, written back whole."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dylora_moe.config import RunConfig, load_recipe, make_config, split_list, to_yaml
from dylora_moe.errors import ConfigError

# Every setting, at another value than its default. A setting is part of recipes, flags and run folders for ever:
# one more, or one less, is a decision to take here too.
ALL_CHANGED: dict[str, Any] = {
    "base_model": "./base",
    "output_dir": "elsewhere",
    "run_name": "a.b-c_1",
    "seed": 5,
    "datasets": ["requests", {"path": "rows.jsonl", "domain": "\u00e9", "num_examples": 3}],
    "data_registry": {"mine": {"path": "rows.jsonl"}},
    "validation_split": 0.25,
    "training_subset": 12.5,
    "eval_subset": 50,
    "interleaved_sampling": True,
    "domain_weights": None,
    "sampling_temperature": 1.0,
    "max_length": 77,
    "overlong": "drop",
    "learn": "all",
    "chat_template": "plain",
    "packing": True,
    "num_experts": 8,
    "lora_r": 24,
    "lora_alpha": 7,
    "lora_dropout": 0,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj"],
    "granularity": "token",
    "router_scope": "per_layer",
    "tap_layer": 2,
    "top_k": 3,
    "temperature": 0.5,
    "balance_coefficient": 0.02,
    "z_coefficient": 1e-3,
    "execution": "grouped",
    "batch_size": 3,
    "eval_batch_size": 5,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-5,
    "num_epochs": 1.5,
    "max_steps": 9,
    "warmup_ratio": 0,
    "weight_decay": 0,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.3,
    "bf16": False,
    "fp16": True,
    "load_in_4bit": True,
    "gradient_checkpointing": True,
    "logging_steps": 2,
    "eval_steps": 7,
    "save_steps": 7,
    "save_total_limit": 2,
    "resume": "never",
    "sample_tokens": 0,
}
SETTINGS = list(ALL_CHANGED)
# Ways of mixing that exclude interleaved_sampling.
MIXING = {"domain_weights": {"code": 2, "maths": 0.5}, "sampling_temperature": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """(text) -> a recipe file."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def message(call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def test_the_settings_are_these() -> None:
    assert list(RunConfig.model_fields) == SETTINGS


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_described(name: str) -> None:
    description = RunConfig.model_fields[name].description
    assert description and description.endswith(".") and len(description) > 20


def test_the_defaults_work_together() -> None:
    config = make_config({})
    assert config.run_dir == Path("runs/run")
    assert config.datasets == ("requests", "stripe", "flask")


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config({}).seed = 3


def test_written_settings_make_the_same_run_again(recipe: Any) -> None:
    config = make_config(ALL_CHANGED)
    default = RunConfig()
    assert [name for name in SETTINGS if getattr(config, name) == getattr(default, name)] == list(MIXING)
    text = to_yaml(config)
    assert list(yaml.safe_load(text)) == SETTINGS
    assert make_config(load_recipe(recipe(text))) == config
    assert make_config(load_recipe(recipe(to_yaml(default)))) == default
    for name, value in MIXING.items():
        config = make_config({name: value})
        assert getattr(config, name) == value
        assert make_config(load_recipe(recipe(to_yaml(config)))) == config


def test_a_recipe_gives_its_settings_and_no_others(recipe: Any) -> None:
    path = recipe("# how it was run\nlearning_rate: 2e-4\nmax_steps:\ntarget_modules: [q_proj]\n")
    values = load_recipe(path)
    assert set(values) == {"learning_rate", "max_steps", "target_modules"}
    config = make_config(values)
    # YAML 1.1 takes 2e-4, written without a dot, for text.
    assert config.learning_rate == 2e-4 and config.max_steps is None and config.target_modules == ("q_proj",)


def test_an_unknown_key_is_named_with_file_line_and_nearest_setting(recipe: Any) -> None:
    path = recipe("# a comment\nseed: 1\n\nlearning_rat: 1.0\n")
    text = message(load_recipe, path)
    assert f"{path}:4:" in text and "'learning_rat'" in text and "Did you mean learning_rate?" in text


def test_an_unknown_key_like_no_setting_points_to_the_list(recipe: Any) -> None:
    text = message(load_recipe, recipe("quux: 1\n"))
    assert "mine.yaml:1:" in text and "Did you mean" not in text and "dylora train --help" in text


def test_an_unknown_setting_without_a_recipe_is_refused_too() -> None:
    text = message(make_config, {"top_kk": 1}, where="flags")
    assert text.startswith("flags: ") and "Did you mean top_k?" in text


def test_a_key_twice_is_refused_with_the_second_line(recipe: Any) -> None:
    path = recipe("seed: 1\nlora_r: 8\nseed: 2\n")
    text = message(load_recipe, path)
    assert f"{path}:3:" in text and "seed" in text and "second time" in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: [1\nlora_r: 8\n", "line 2"),
        ("seed: 1\n\tlora_r: 8\n", "line 2"),
        ("seed: 1\n--- \nseed: 2\n", "line 2"),
        ("seed: !!python/object/apply:os.getcwd []\n", "line 1"),
        ("- seed\n- lora_r\n", "got list"),
        ("just words\n", "got str"),
        ("", "got NoneType"),
        (b"run_name: caf\xe9\n", "UTF-8"),
    ],
)
def test_what_is_no_mapping_in_yaml_is_refused_by_name(recipe: Any, text: str | bytes, told: str) -> None:
    path = recipe(text)
    shown = message(load_recipe, path)
    assert str(path) in shown and told in shown


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in message(load_recipe, tmp_path / name)


BAD_VALUES = [
    ("run_name", "../up"),
    ("run_name", "a/b"),
    ("run_name", ".hidden"),
    ("run_name", ""),
    ("seed", -1),
    ("seed", 2**32),
    ("datasets", []),
    ("datasets", "requests"),
    ("datasets", [3]),
    ("validation_split", 0),
    ("validation_split", 1),
    ("training_subset", 0),
    ("training_subset", 100.5),
    ("eval_subset", -1),
    ("max_length", 7),
    ("overlong", "cut"),
    ("learn", "prompts"),
    ("interleaved_sampling", "sometimes"),
    ("domain_weights", {}),
    ("domain_weights", {"code": 0}),
    ("domain_weights", {"code": "much"}),
    ("domain_weights", [1]),
    ("sampling_temperature", 0.5),
    ("sampling_temperature", float("inf")),
    ("num_experts", 0),
    ("num_experts", 2.5),
    ("lora_r", 0),
    ("lora_alpha", 0),
    ("lora_dropout", 1),
    ("lora_dropout", -0.1),
    ("target_modules", 3),
    ("granularity", "word"),
    ("router_scope", "all"),
    ("tap_layer", -1),
    ("top_k", 0),
    ("temperature", 0),
    ("temperature", float("inf")),
    ("balance_coefficient", -1),
    ("z_coefficient", -1),
    ("execution", "fast"),
    ("batch_size", 0),
    ("eval_batch_size", 0),
    ("gradient_accumulation_steps", 0),
    ("learning_rate", 0),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("num_epochs", 0),
    ("num_epochs", float("inf")),
    ("max_steps", 0),
    ("warmup_ratio", 1),
    ("weight_decay", -0.1),
    ("lr_scheduler_type", "step"),
    ("max_grad_norm", 0),
    ("bf16", "maybe"),
    ("logging_steps", 0),
    ("eval_steps", 0),
    ("save_steps", 0),
    ("save_total_limit", 0),
    ("resume", "always"),
    ("sample_tokens", -1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    text = message(make_config, {name: value}, where="mine.yaml")
    assert text.startswith("mine.yaml: ") and name in text and "got" in text


def test_all_bad_values_are_told_at_once() -> None:
    text = message(make_config, {"lora_r": 0, "batch_size": "many"})
    assert "lora_r" in text and "batch_size" in text and "'many'" in text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"top_k": 5}, ["top_k", "num_experts=4", "got 5"]),
        ({"num_experts": 1, "top_k": 2}, ["top_k", "num_experts=1", "got 2"]),
        ({"lora_r": 12}, ["lora_r", "multiple of 8", "4 experts", "got 12", "Take 16"]),
        ({"lora_r": 4}, ["lora_r", "got 4", "Take 8"]),
        ({"fp16": True, "bf16": True}, ["fp16", "bf16", "exclude"]),
        ({"interleaved_sampling": True, "sampling_temperature": 2}, ["sampling_temperature", "exclude", "Choose one"]),
        ({"domain_weights": {"a": 1}, "sampling_temperature": 2}, ["domain_weights", "exclude", "Choose one"]),
    ],
)
def test_settings_that_cannot_work_together_are_refused(values: dict[str, Any], told: list[str]) -> None:
    text = message(make_config, values)
    assert all(part in text for part in told), text


def test_a_single_lora_may_have_any_rank_and_one_expert_of_one() -> None:
    assert make_config({"num_experts": 1, "lora_r": 12}).lora_r == 12


def test_a_flag_of_several_values() -> None:
    assert split_list("a, b,,c ") == ["a", "b", "c"]
    assert split_list("") == []


def test_an_unknown_key_of_a_data_set_is_refused_with_its_line(recipe: Any) -> None:
    path = recipe("seed: 1\ndatasets:\n  - mbpp\n  - path: a.jsonl\n    domian: sql\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert f"{path}:5: " in str(caught.value) and "got 'domian'. Did you mean domain?" in str(caught.value)
