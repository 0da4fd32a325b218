"""Settings: which there are, described, checked one by one and together."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dylora_moe.config import RunConfig, make_config, remarks, to_yaml
from dylora_moe.config.presets import PRESETS, SCENARIOS, with_preset
from dylora_moe.errors import ConfigError

# Every setting, at another value than its default. A setting is part of recipes, flags and run folders for ever:
# one more, or one less, is a decision to take here too.
ALL_CHANGED: dict[str, Any] = {
    "base_model": "./base",
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
    "mode": "joint",
    "skills": [],
    "allow_expert_growth": False,
    "max_experts": 6,
    "at_max_experts": "merge",
    "novelty_detector": "mahalanobis",
    "false_growth_rate": 0.02,
    "feature_rows": 50,
    "served_share": 0.5,
    "stream_router": "learned",
    "unsure_rate": 0.05,
    "unsure_answer": "dense",
    "maturity_ratio": 0.25,
    "warm_start": True,
    "batch_size": 3,
    "eval_batch_size": 5,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-5,
    "router_learning_rate": 1e-4,
    "num_epochs": 1.5,
    "max_steps": 9,
    "warmup_ratio": 0,
    "weight_decay": 0,
    "lr_scheduler_type": "two_phase",
    "seeding_ratio": 0.2,
    "consolidation_factor": 0.5,
    "max_grad_norm": 0.3,
    "eval_steps": 7,
    "load_best_model_at_end": False,
    "metric_for_best_model": "eval_code_loss",
    "early_stopping_patience": 4,
    "output_dir": "elsewhere",
    "remote_dir": "gs://bucket/runs",
    "run_name": "a.b-c_1",
    "seed": 5,
    "preset": "t4",
    "scenario": "debug",
    "bf16": False,
    "fp16": True,
    "load_in_4bit": True,
    "sharding": "none",
    "gradient_checkpointing": True,
    "activation_offload": True,
    "torch_compile": True,
    "dataloader_num_workers": 2,
    "dataloader_pin_memory": True,
    "logging_steps": 2,
    "save_steps": 7,
    "save_total_limit": 2,
    "resume": "never",
    "wandb_checkpoint_artifact": None,
    "report_to": ["wandb", "tensorboard"],
    "wandb_artifacts": "checkpoints",
    "sample_tokens": 0,
}
SETTINGS = list(ALL_CHANGED)
# What stays at its default above: ways of mixing that exclude interleaved_sampling, what excludes resume or 4 bits, and
# what makes a stream of skills, which go together and refuse much of the above.
ALONE = {
    "sharding": "full",
    "domain_weights": {"code": 2, "maths": 0.5},
    "sampling_temperature": 2,
    "wandb_checkpoint_artifact": "user/project/name:v0",
}
REFUSED = ["mode", "skills"]
STREAM: dict[str, Any] = {
    "mode": "continual",
    "skills": ["flask", {"skill": "maths", "datasets": ["sums.jsonl"], "decision": "grow", "lora_r": 8}],
}
NOT_OF_STREAMS = {
    "sharding",
    "granularity",
    "router_scope",
    "top_k",
    "interleaved_sampling",
    "domain_weights",
    "sampling_temperature",
    "metric_for_best_model",
    "wandb_checkpoint_artifact",
    "wandb_artifacts",
}


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
    ("eval_steps", "often"),
    ("early_stopping_patience", 0),
    ("seeding_ratio", 0),
    ("seeding_ratio", 1),
    ("consolidation_factor", 1.5),
    ("router_learning_rate", 0),
    ("load_best_model_at_end", "maybe"),
    ("save_steps", 0),
    ("save_steps", None),
    ("scenario", "holiday"),
    ("dataloader_num_workers", -1),
    ("dataloader_pin_memory", "maybe"),
    ("torch_compile", "maybe"),
    ("report_to", "wandb"),
    ("report_to", ["excel"]),
    ("wandb_artifacts", "all"),
    ("run_name", "{gpu}"),
    ("router_scope", "all"),
    ("save_total_limit", 0),
    ("resume", 3),
    ("sample_tokens", -1),
    ("mode", "stream"),
    ("skills", "flask"),
    ("skills", [3]),
    ("allow_expert_growth", "maybe"),
    ("max_experts", 0),
    ("novelty_detector", "euclid"),
    ("false_growth_rate", 0),
    ("false_growth_rate", 0.5),
    ("feature_rows", 19),
    ("served_share", 0),
    ("unsure_rate", -0.1),
    ("unsure_rate", 0.5),
    ("unsure_answer", "nobody"),
    ("maturity_ratio", -0.1),
    ("maturity_ratio", 1.1),
    ("warm_start", "maybe"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    text = message(make_config, {name: value}, where="mine.yaml")
    assert text.startswith(f"mine.yaml: {name} must be ") and ", got " in text and text.count(" must be ") == 1, text


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("learning_rate", 0, "learning_rate must be a number above 0, got 0"),
        ("lora_dropout", 1, "lora_dropout must be a number of at least 0 and below 1, got 1"),
        ("overlong", "cut", "overlong must be error, drop, truncate or split, got 'cut'"),
        ("eval_steps", "x", "eval_steps must be a whole number of at least 1, or epoch, got 'x'"),
        ("eval_steps", 0, "eval_steps must be at least 1, or epoch, got 0"),
        ("target_modules", 3, "target_modules must be all-linear, attention, or a list of last parts of Linear names"),
        ("report_to", ["wandb", "excel"], "a list of tensorboard, trackio and wandb, got 'excel' in place 2"),
        ("domain_weights", {"a": 1, "b": 0}, "names of domains with numbers above 0, got 0 for b"),
        ("datasets", [3], "a list of at least one name, path or mapping, got 3 in place 1"),
    ],
)
def test_a_wrong_value_is_told_in_one_sentence_whatever_its_types(name: str, value: object, told: str) -> None:
    text = message(make_config, {name: value})
    assert told in text and text.count(" must be ") == 1


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
        ({"early_stopping_patience": 3}, ["early_stopping_patience", "eval_steps"]),
        ({"activation_offload": True}, ["activation_offload", "gradient_checkpointing"]),
        ({"wandb_checkpoint_artifact": "u/p/n:v0", "resume": "never"}, ["wandb_checkpoint_artifact", "resume"]),
        ({"wandb_artifacts": "checkpoints"}, ["wandb_artifacts", "wandb in report_to", "Add it"]),
        (
            STREAM | {"wandb_artifacts": "checkpoints", "report_to": ["wandb"]},
            ["wandb_artifacts must be model or none", "got checkpoints", "remote_dir"],
        ),
        ({"allow_expert_growth": True}, ["allow_expert_growth: true must", "got mode: joint", "Set num_experts"]),
        ({"skills": ["flask", "mbpp"]}, ["skills must", "mode: continual", "got 2 with mode: joint", "datasets"]),
        ({"mode": "continual"}, ["skills must be given", "got none", "Give a list"]),
        (STREAM | {"granularity": "token"}, ["granularity must be sequence", "got token", "Leave it out"]),
        (STREAM | {"router_scope": "per_layer"}, ["router_scope must be shared", "got per_layer", "Leave it out"]),
        (STREAM | {"top_k": 2}, ["top_k must be 1", "got 2", "Leave it out"]),
        (STREAM | {"interleaved_sampling": True}, ["interleaved_sampling must not", "got True", "Leave it out"]),
        (STREAM | {"domain_weights": {"flask": 2}}, ["domain_weights must not", "got {'flask': 2.0}", "Leave it out"]),
        (STREAM | {"sampling_temperature": 2}, ["sampling_temperature must not", "got 2.0", "Leave it out"]),
        (STREAM | {"metric_for_best_model": "eval_x_loss"}, ["metric_for_best_model must", "got eval_x_loss", "Leave"]),
        (STREAM | {"resume": "runs/a/checkpoints/7"}, ["resume must be auto or never", "got runs/a", "Leave it out"]),
        (
            STREAM | {"wandb_checkpoint_artifact": "u/p/n:v0"},
            ["wandb_checkpoint_artifact must", "got u/p/n:v0", "Leave"],
        ),
        (STREAM | {"lora_r": 12}, ["lora_r must be a multiple of 8 with mode: continual", "got 12", "Take 16."]),
        ({"report_to": ["wandb", "wandb"]}, ["report_to", "once", "wandb, wandb"]),
        ({"fp16": True, "bf16": True}, ["fp16", "bf16", "exclude"]),
        ({"sharding": "full", "fp16": True, "bf16": False}, ["sharding", "excludes fp16"]),
        ({"sharding": "full", "load_in_4bit": True}, ["sharding", "excludes load_in_4bit"]),
        (STREAM | {"sharding": "full"}, ["sharding", "excludes mode: continual"]),
        ({"sharding": "zero2", "fp16": True, "bf16": False}, ["sharding: zero2", "excludes fp16"]),
        ({"interleaved_sampling": True, "sampling_temperature": 2}, ["sampling_temperature", "exclude", "Choose one"]),
        ({"domain_weights": {"a": 1}, "sampling_temperature": 2}, ["domain_weights", "exclude", "Choose one"]),
    ],
)
def test_settings_that_cannot_work_together_are_refused(values: dict[str, Any], told: list[str]) -> None:
    text = message(make_config, values)
    assert all(part in text for part in told), text


def test_a_single_lora_may_have_any_rank_and_one_expert_of_one() -> None:
    assert make_config({"num_experts": 1, "lora_r": 12}).lora_r == 12


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in REFUSED])
def test_a_stream_refuses_nothing_else(name: str) -> None:
    """Of all settings only those of `test_settings_that_cannot_work_together_are_refused` do not go with a stream."""
    value = ALONE.get(name, ALL_CHANGED[name])
    together: dict[str, dict[str, Any]] = {
        "early_stopping_patience": {"eval_steps": 100},
        "fp16": {"bf16": False},
        "activation_offload": {"gradient_checkpointing": True},
    }
    needed = together.get(name, {})
    if name in NOT_OF_STREAMS:
        message(make_config, STREAM | needed | {name: value})
    else:
        make_config(STREAM | needed | {name: value})


def test_a_stream_is_written_and_read_again() -> None:
    config = make_config(STREAM | {"allow_expert_growth": True, "resume": "never"})
    assert config.skills == tuple(STREAM["skills"])
    assert make_config(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("name", [*PRESETS, *SCENARIOS])
def test_a_stream_goes_with_every_preset(name: str) -> None:
    flags = {"preset": name} if name in PRESETS else {"scenario": name}
    assert remarks(make_config(with_preset(STREAM, flags))) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max_experts": 3}, "max_experts has no effect with mode joint: set mode: continual"),
        ({"warm_start": True, "served_share": 0.6}, "served_share and warm_start have no effect with mode joint"),
        (STREAM | {"datasets": ["mbpp"]}, "datasets has no effect with mode continual"),
        (STREAM | {"num_experts": 8}, "num_experts has no effect with mode continual: experts come with new skills"),
        (STREAM | {"num_experts": 1}, "num_experts has no effect with mode continual"),
        (STREAM | {"balance_coefficient": 0.0}, "balance_coefficient has no effect with mode continual"),
        (
            STREAM | {"z_coefficient": 1e-3, "router_learning_rate": 1e-4},
            "router_learning_rate and z_coefficient have no effect with mode continual: its router is not trained",
        ),
        (
            STREAM | {"stream_router": "learned", "unsure_rate": 0.05},
            "unsure_rate has no effect with stream_router learned",
        ),
        (STREAM | {"unsure_rate": 0, "unsure_answer": "dense"}, "unsure_answer has no effect with unsure_rate 0"),
        (STREAM | {"temperature": 0.7}, "temperature has no effect with maturity_ratio 0 and unsure_answer base"),
        (
            STREAM | {"novelty_detector": "cosine", "false_growth_rate": 0.02},
            "false_growth_rate has no effect with novelty_detector cosine",
        ),
        (
            STREAM | {"allow_expert_growth": False, "max_experts": 3},
            "max_experts has no effect with allow_expert_growth false",
        ),
        (STREAM | {"maturity_ratio": 0.75}, "maturity_ratio 0.75 is above 0.5, the highest recommended: longer help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_nothing_in_a_mode_is_remarked_on(values: dict[str, Any], told: str) -> None:
    (remark,) = remarks(make_config(values))
    assert told in remark and remark.endswith(".")


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "joint", "allow_expert_growth": False},
        STREAM,
        STREAM | {"temperature": 0.7, "maturity_ratio": 0.2},
        STREAM | {"temperature": 0.7, "unsure_answer": "dense"},
        STREAM | {"false_growth_rate": 0.02},
        STREAM | {"allow_expert_growth": False},
        STREAM | {"max_experts": 3},
        STREAM | {"granularity": "sequence", "router_scope": "shared", "top_k": 1},
    ],
    ids=str,
)
def test_what_does_something_in_a_mode_is_not(values: dict[str, Any]) -> None:
    assert remarks(make_config(values)) == []
