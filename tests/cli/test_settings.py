"""Every setting is a flag in two spellings, and says the same as in a recipe."""

import random
from pathlib import Path
from typing import Any

import click
import pytest

from dylora_moe.cli.settings import config_of, given_settings
from dylora_moe.cli.train import command
from dylora_moe.config import ALIASES, RunConfig, make_config
from dylora_moe.errors import ConfigError

# Setting -> a value as it is typed, not the default, and the value that it means; booleans are apart.
TYPED: dict[str, tuple[str, Any]] = {
    "base_model": ("./base", "./base"),
    "mode": ("continual", "continual"),
    "skills": ("requests, rows.jsonl", ("requests", "rows.jsonl")),
    "max_experts": ("5", 5),
    "at_max_experts": ("merge", "merge"),
    "novelty_detector": ("cosine", "cosine"),
    "false_growth_rate": ("0.02", 0.02),
    "feature_rows": ("50", 50),
    "served_share": ("0.5", 0.5),
    "stream_router": ("learned", "learned"),
    "unsure_rate": ("0.05", 0.05),
    "unsure_answer": ("dense", "dense"),
    "maturity_ratio": ("0.25", 0.25),
    "output_dir": ("/tmp/x", Path("/tmp/x")),
    "run_name": ("other", "other"),
    "remote_dir": ("file:///elsewhere", "file:///elsewhere"),
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
    "router_learning_rate": ("1e-3", 1e-3),
    "seeding_ratio": ("0.2", 0.2),
    "consolidation_factor": ("0.5", 0.5),
    "metric_for_best_model": ("eval_code_loss", "eval_code_loss"),
    "early_stopping_patience": ("4", 4),
    "preset": ("t4", "t4"),
    "scenario": ("debug", "debug"),
    "sharding": ("full", "full"),
    "dataloader_num_workers": ("2", 2),
    "wandb_checkpoint_artifact": ("user/project/name:v0", "user/project/name:v0"),
    "report_to": ("wandb,tensorboard", ("wandb", "tensorboard")),
    "wandb_artifacts": ("none", "none"),
    "save_steps": ("7", 7),
    "save_total_limit": ("2", 2),
    "resume": ("never", "never"),
    "sample_tokens": ("0", 0),
}
SWITCHES = (
    "interleaved_sampling",
    "packing",
    "use_rslora",
    "bf16",
    "fp16",
    "load_in_4bit",
    "gradient_checkpointing",
    "activation_offload",
    "torch_compile",
    "dataloader_pin_memory",
    "load_best_model_at_end",
    "allow_expert_growth",
    "warm_start",
)
# Settings that need others beside them.
NEEDED: dict[str, dict[str, Any]] = {
    "early_stopping_patience": {"eval_steps": 100},
    "mode": {"skills": ["flask"]},
    "skills": {"mode": "continual"},
}


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
            assert getattr(make_config(given | NEEDED.get(name, {})), name) == value


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


@pytest.mark.parametrize("flag", ["--datasets", "--skills", "--target_modules"])
def test_an_empty_list_is_given_all_the_same(flag: str) -> None:
    assert parse(flag, "") == {flag[2:]: []}


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_help_says_what_a_setting_is_and_its_default(name: str) -> None:
    (option,) = [option for option in command.params if option.name == name]
    assert isinstance(option, click.Option) and option.help
    field = RunConfig.model_fields[name]
    assert field.description and option.help.startswith(field.description)
    assert ("Default: " in option.help) is (field.default is not None)


def test_choices_are_in_the_help() -> None:
    (option,) = (option for option in command.params if option.name == "execution")
    assert option.metavar == "auto|reference|bottleneck|rowwise|grouped|triton"


@pytest.mark.parametrize("typed", ["code", "=2", "code=2,maths", "code=2,code=1"])
def test_weights_without_a_name_or_a_number_are_refused(typed: str) -> None:
    with pytest.raises(click.BadParameter, match=r"names and their numbers such as code=2,maths=1"):
        parse("--domain_weights", typed)


@pytest.mark.parametrize("name", ["eval_steps", "save_steps"])
def test_a_number_of_steps_or_the_word_epoch(name: str) -> None:
    assert make_config(parse(f"--{name}", "epoch")) == make_config({name: "epoch"})
    assert parse(f"--{name}", "12") == {name: 12}
    with pytest.raises(click.BadParameter, match="'often' is not a whole number or epoch"):
        parse(f"--{name}", "often")
    assert f"--{name.replace('_', '-')} INTEGER|epoch" in help_text()


def help_text() -> str:
    with command.make_context("train", []) as context:
        return command.get_help(context)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_another_name_of_a_setting_is_a_flag_too_but_not_in_the_help(alias: str, name: str) -> None:
    for spelling in spellings(alias):
        if name in SWITCHES:
            off = f"--no_{alias}" if "_" in spelling else f"--no-{spelling[2:]}"
            assert parse(spelling) == {name: True} and parse(off) == {name: False}
        else:
            typed, value = TYPED[name]
            assert getattr(make_config(parse(spelling, typed)), name) == value
    assert f"--{alias} " not in help_text() and f"--{alias}," not in help_text()


def test_two_names_of_one_setting_are_refused() -> None:
    with pytest.raises(ConfigError, match="flags: num_epochs and epochs are the same setting, got both"):
        parse("--num_epochs", "2", "--epochs", "3")


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--learnin_rate", "there is no flag --learnin_rate. Did you mean --learning_rate?"),
        ("--learning-rat=1", "there is no flag --learning-rat. Did you mean --learning_rate?"),
        ("--sed", "Did you mean --seed?"),
        ("--epchs", "Did you mean --num_epochs?"),
        ("--no-pakcing", "Did you mean --no-packing?"),
        ("--pin-memroy", "Did you mean --dataloader_pin_memory?"),
        ("--jsno", "Did you mean --json?"),
        ("--warmup", "Did you mean --warmup_ratio?"),
        ("--evaluation_strategy", "Write eval_steps: a number of steps, or epoch."),
        ("--zzzzzz", "`dylora config explain` lists those of settings."),
    ],
)
def test_an_unknown_flag_is_answered_with_what_was_meant(flag: str, told: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse(flag, "1")
    assert told in caught.value.message and caught.value.exit_code == 2


def test_a_flag_with_one_wrong_letter_is_answered_with_it() -> None:
    draw, right = random.Random(0), 0
    for name in RunConfig.model_fields:
        place = draw.randrange(len(name))
        with pytest.raises(click.UsageError) as caught:
            parse(f"--{name[:place]}{name[place + 1 :]}", "1")
        right += f"Did you mean --{name}" in caught.value.message
    assert right >= 0.95 * len(RunConfig.model_fields)


def test_flags_stand_over_a_preset_over_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 5\nbatch_size: 8\ngradient_checkpointing: false\nlogging_steps: 3\n")
    config = config_of(recipe, parse("--preset", "t4", "--scenario", "debug", "--eval_batch_size", "7"))
    assert config.run_name == "mine" and config.preset == "t4"
    assert (config.batch_size, config.gradient_accumulation_steps, config.gradient_checkpointing) == (1, 8, True)
    assert (config.num_epochs, config.logging_steps, config.eval_batch_size) == (1, 5, 7)
    assert config_of(recipe, parse("--num_train_epochs", "2")).num_epochs == 2
    with pytest.raises(ConfigError, match="preset must be one of"):
        config_of(recipe, parse("--preset", "t5"))
