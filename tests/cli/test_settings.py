"""Every setting is a flag in two spellings, and says the same as in a recipe."""

from pathlib import Path
from typing import Any

import click
import pytest

from dylora_moe.cli.settings import given_settings
from dylora_moe.cli.train import command
from dylora_moe.config import RunConfig, make_config

# Setting -> a value as it is typed, not the default, and the value that it means; booleans are apart.
TYPED: dict[str, tuple[str, Any]] = {
    "base_model": ("./base", "./base"),
    "output_dir": ("/tmp/x", Path("/tmp/x")),
    "run_name": ("other", "other"),
    "seed": ("7", 7),
    "datasets": ("requests, rows.jsonl", ("requests", "rows.jsonl")),
    "data_registry": ("own.yaml", "own.yaml"),
    "validation_split": ("0.5", 0.5),
    "training_subset": ("10", 10.0),
    "eval_subset": ("12.5", 12.5),
    "max_length": ("99", 99),
    "overlong": ("drop", "drop"),
    "learn": ("all", "all"),
    "domain_weights": ("code=2,maths=1.5", {"code": 2.0, "maths": 1.5}),
    "sampling_temperature": ("2", 2.0),
    "chat_template": ("plain", "plain"),
    "num_experts": ("8", 8),
    "lora_r": ("32", 32),
    "lora_alpha": ("7.5", 7.5),
    "lora_dropout": ("0", 0.0),
    "target_modules": ("q_proj,v_proj", ("q_proj", "v_proj")),
    "granularity": ("token", "token"),
    "router_scope": ("per_layer", "per_layer"),
    "tap_layer": ("2", 2),
    "top_k": ("2", 2),
    "temperature": ("0.5", 0.5),
    "balance_coefficient": ("0", 0.0),
    "z_coefficient": ("1e-3", 1e-3),
    "execution": ("grouped", "grouped"),
    "batch_size": ("3", 3),
    "eval_batch_size": ("4", 4),
    "gradient_accumulation_steps": ("2", 2),
    "learning_rate": ("2e-5", 2e-5),
    "num_epochs": ("1.5", 1.5),
    "max_steps": ("11", 11),
    "warmup_ratio": ("0.1", 0.1),
    "weight_decay": ("0.2", 0.2),
    "lr_scheduler_type": ("linear", "linear"),
    "max_grad_norm": ("2", 2.0),
    "logging_steps": ("1", 1),
    "eval_steps": ("3", 3),
    "save_steps": ("7", 7),
    "save_total_limit": ("2", 2),
    "resume": ("never", "never"),
    "sample_tokens": ("0", 0),
}
SWITCHES = ("interleaved_sampling", "packing", "use_rslora", "bf16", "fp16", "load_in_4bit", "gradient_checkpointing")


def parse(*arguments: str) -> dict[str, Any]:
    with command.make_context("train", list(arguments)) as context:
        return given_settings(context.params)


def spellings(name: str) -> list[str]:
    return sorted({f"--{name}", f"--{name.replace('_', '-')}"})


def test_every_setting_has_a_flag() -> None:
    assert set(TYPED) | set(SWITCHES) == set(RunConfig.model_fields)


@pytest.mark.parametrize("name", TYPED)
def test_a_flag_in_both_spellings_means_what_it_says(name: str) -> None:
    typed, value = TYPED[name]
    assert value != getattr(RunConfig(), name)
    for spelling in spellings(name):
        for arguments in ([spelling, typed], [f"{spelling}={typed}"]):
            given = parse(*arguments)
            assert list(given) == [name]
            assert getattr(make_config(given), name) == value


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_on_off_or_not_given(name: str) -> None:
    assert parse() == {}
    for spelling in spellings(name):
        assert parse(spelling) == {name: True}
    for spelling in (f"--no_{name}", f"--no-{name.replace('_', '-')}"):
        assert parse(spelling) == {name: False}


@pytest.mark.parametrize(("typed", "value"), [("all-linear", "all-linear"), ("attention", "attention")])
def test_target_words_stay_words(typed: str, value: str) -> None:
    assert make_config(parse("--target_modules", typed)).target_modules == value


@pytest.mark.parametrize("flag", ["--datasets", "--target_modules"])
def test_an_empty_list_is_given_all_the_same(flag: str) -> None:
    assert parse(flag, "") == {flag[2:]: []}


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_help_says_what_a_setting_is_and_its_default(name: str) -> None:
    (option,) = [option for option in command.params if option.name == name]
    assert isinstance(option, click.Option) and option.help
    field = RunConfig.model_fields[name]
    assert field.description and option.help.startswith(field.description)
    assert ("Default: " in option.help) is (field.default is not None)


def test_choices_are_refused_on_the_command_line() -> None:
    with pytest.raises(click.BadParameter, match=r"'auto', 'reference', 'bottleneck', 'rowwise', 'grouped'"):
        parse("--execution", "fast")


@pytest.mark.parametrize("typed", ["code", "=2", "code=2,maths", "code=2,code=1"])
def test_weights_without_a_name_or_a_number_are_refused(typed: str) -> None:
    with pytest.raises(click.BadParameter, match=r"names and their numbers such as code=2,maths=1"):
        parse("--domain_weights", typed)
