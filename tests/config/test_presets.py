"""Presets and scenarios: the effective batch stays, the stronger source wins, and each card finds its own."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dylora_moe.config import RunConfig, load_recipe, make_config
from dylora_moe.config.presets import (
    PRESETS,
    SCENARIOS,
    Machine,
    check_preset_name,
    device_slug,
    name_run,
    recognise,
    settle,
    split_batch,
    with_preset,
)
from dylora_moe.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
CPU = Machine(device_name="cpu", memory_bytes=8 * 10**9, kind="cpu", has_bf16=True)


def card(name: str, gib: float, *, has_bf16: bool = True) -> Machine:
    return Machine(device_name=name, memory_bytes=int(gib * 2**30), kind="cuda", has_bf16=has_bf16)


T4 = card("Tesla T4", 14.6, has_bf16=False)
COUNTS = st.integers(1, 64)
NAMES = st.sampled_from([*PRESETS, "auto", "none"])
PURPOSES = st.sampled_from([None, *SCENARIOS])


def rows_of_a_step(values: dict[str, Any]) -> int:
    return values.get("batch_size", 8) * values.get("gradient_accumulation_steps", 1)


@given(effective=st.integers(1, 4096), most=COUNTS)
def test_the_micro_batch_is_the_largest_that_divides(effective: int, most: int) -> None:
    parts = split_batch(effective, most)
    assert rows_of_a_step(parts) == effective and parts["batch_size"] <= most
    assert not any(effective % size == 0 for size in range(parts["batch_size"] + 1, min(most, effective) + 1))


@given(
    recipe=st.fixed_dictionaries(
        {"preset": NAMES, "scenario": PURPOSES},
        optional={"batch_size": COUNTS, "gradient_accumulation_steps": COUNTS, "fp16": st.just(True)},
    ),
    flags=st.fixed_dictionaries(
        {},
        optional={"batch_size": COUNTS, "gradient_accumulation_steps": COUNTS, "preset": NAMES, "bf16": st.just(False)},
    ),
)
def test_no_preset_changes_the_effective_batch_or_a_flag(recipe: dict[str, Any], flags: dict[str, Any]) -> None:
    values = with_preset(recipe, flags)
    assert rows_of_a_step(values) == rows_of_a_step(recipe | flags)
    assert {name: values[name] for name in flags} == flags
    config = make_config(values)
    for machine in (CPU, T4):
        settled = settle(config, machine)
        assert rows_of_a_step(settled.model_dump()) == rows_of_a_step(values)
        make_config(settled.model_dump())


def test_the_batches_of_the_founding_documents() -> None:
    expected = {
        ("t4", 8): (1, 8),
        ("l4", 9): (3, 3),
        ("a100", 8): (2, 4),
        ("a10g_high", 32): (8, 4),
        ("a10g_balanced", 32): (4, 8),
        ("a10g_low", 32): (2, 16),
        ("m3_high", 24): (3, 8),
        ("m3_balanced", 32): (2, 16),
        ("m3_low", 32): (2, 16),
        ("m3_safe", 32): (1, 32),
    }
    for (name, effective), batch in expected.items():
        values = with_preset({"batch_size": effective, "preset": name}, {})
        assert (values["batch_size"], values["gradient_accumulation_steps"]) == batch, name
    for name, effective, batch in (("memory_constrained", 16, (1, 16)), ("high_performance", 8, (4, 2))):
        values = with_preset({"batch_size": effective}, {"scenario": name})
        assert (values["batch_size"], values["gradient_accumulation_steps"]) == batch, name


def test_every_preset_and_scenario_makes_a_run() -> None:
    for preset in PRESETS:
        for scenario in (None, *SCENARIOS):
            config = make_config(with_preset({"preset": preset, "scenario": scenario}, {}))
            assert (config.preset, config.scenario) == (preset, scenario)
            assert not (config.fp16 and config.bf16)


def test_strength_from_recipe_to_flag() -> None:
    recipe = {"preset": "t4", "bf16": True, "eval_batch_size": 16, "gradient_checkpointing": False, "num_epochs": 7}
    by_preset = with_preset(recipe, {})
    assert by_preset["fp16"] and not by_preset["bf16"] and by_preset["gradient_checkpointing"]
    assert by_preset["eval_batch_size"] == 1 and by_preset["num_epochs"] == 7
    by_scenario = with_preset(recipe, {"scenario": "high_performance"})
    assert not by_scenario["gradient_checkpointing"] and by_scenario["batch_size"] == 4 and by_scenario["fp16"]
    by_flag = with_preset(recipe, {"scenario": "debug", "num_epochs": 2, "eval_batch_size": 5})
    assert (by_flag["num_epochs"], by_flag["eval_batch_size"], by_flag["eval_steps"]) == (2, 5, 10)
    assert with_preset(recipe, {"preset": "none"}) == recipe | {"preset": "none"}
    assert with_preset({"seed": 3}, {"seed": 4}) == {"seed": 4}


def test_a_flag_for_half_of_a_pair_keeps_the_preset_from_the_other_half() -> None:
    values = with_preset({"preset": "t4", "gradient_accumulation_steps": 8}, {"batch_size": 2})
    assert (values["batch_size"], values["gradient_accumulation_steps"]) == (2, 8)
    values = with_preset({"preset": "t4"}, {"bf16": False})
    assert values["bf16"] is False and "fp16" not in values


def test_values_that_are_no_counts_are_left_to_the_check_of_settings() -> None:
    for wrong in ("many", 0, -2, True, None, 2.5, [4]):
        values = with_preset({"preset": "t4", "batch_size": wrong}, {})
        assert values["batch_size"] is wrong and "gradient_accumulation_steps" not in values
    assert with_preset({"preset": "t4", "batch_size": "6"}, {})["gradient_accumulation_steps"] == 6
    assert with_preset({"preset": 4, "scenario": ["debug"]}, {}) == {"preset": 4, "scenario": ["debug"]}


@pytest.mark.parametrize(
    ("name", "near"), [("t5", "t4"), ("a10g_balnced", "a10g_balanced"), ("m3_hihg", "m3_high"), ("H10", "h100")]
)
def test_an_unknown_preset_is_told_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"preset must be one of auto, none, t4, .*{name}.*Did you mean {near}\?"):
        with_preset({"preset": name}, {})


def test_an_unknown_scenario_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"scenario must be one of debug, .*Did you mean production\?"):
        with_preset({}, {"scenario": "produktion"})


def test_case_and_hyphens_do_not_matter() -> None:
    assert check_preset_name(" A10G-High ") == "a10g_high" and check_preset_name("Auto") == "auto"
    values = with_preset({"preset": "T4"}, {"scenario": "memory-constrained"})
    assert (values["preset"], values["scenario"]) == ("t4", "memory_constrained")


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (T4, "t4"),
        (card("NVIDIA L4", 22.0), "l4"),
        (card("NVIDIA A10G", 22.1), "a10g_balanced"),
        (card("NVIDIA A10", 22.0), "a10g_balanced"),
        (card("NVIDIA A100-SXM4-40GB", 39.4), "a100"),
        (card("NVIDIA A100-SXM4-80GB", 79.2), "a100"),
        (card("NVIDIA H100 80GB HBM3", 79.1), "h100"),
        (card("NVIDIA H200", 139.8), "h100"),
        (card("NVIDIA GH200 480GB", 94.5), "h100"),  # by memory
        (card("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.6), "a10g_high"),  # a slice of a card
        (card("NVIDIA L40S", 44.4), "a100"),
        (card("NVIDIA GeForce RTX 4090", 23.5), "l4"),
        (card("NVIDIA GeForce RTX 4080", 15.7), "a10g_balanced"),
        (card("NVIDIA GeForce RTX 3060", 11.8), "a10g_low"),
        (card("NVIDIA GeForce RTX 3050", 5.8), "a10g_low"),
        (card("AMD Instinct MI300X", 191.5), "h100"),
        (card("Tesla V100-SXM2-32GB", 31.7, has_bf16=False), "t4"),
        (card("NVIDIA GeForce GTX 1080", 7.9, has_bf16=False), "t4"),
        (CPU, "cpu"),
    ],
    ids=lambda value: value.device_name if isinstance(value, Machine) else value,
)
def test_machines_are_recognised(machine: Machine, expected: str) -> None:
    assert recognise(machine) == expected


@pytest.mark.parametrize(
    ("gib", "expected"),
    [(8, "m3_safe"), (16, "m3_low"), (18, "m3_balanced"), (24, "m3_high"), (128, "m3_high"), (0, "m3_safe")],
)
def test_macs_are_recognised_by_memory(gib: int, expected: str) -> None:
    assert recognise(Machine(device_name="Apple M3", memory_bytes=gib * 2**30, kind="mps", has_bf16=False)) == expected


def test_a_recognised_preset_fills_only_what_was_not_given() -> None:
    filled = settle(make_config({}), T4)
    assert (filled.batch_size, filled.gradient_accumulation_steps, filled.eval_batch_size) == (1, 8, 1)
    assert filled.fp16 and filled.bf16 is False and filled.gradient_checkpointing and filled.preset == "t4"
    own = settle(make_config({"batch_size": 4, "eval_batch_size": 2, "bf16": False}), T4)
    assert (own.batch_size, own.gradient_accumulation_steps, own.eval_batch_size) == (4, 1, 2)
    assert not own.fp16 and own.bf16 is False and own.gradient_checkpointing
    assert settle(make_config({"gradient_accumulation_steps": 2}), T4).batch_size == 8


def test_a_preset_that_was_named_is_not_recognised_again() -> None:
    for name in ("none", "l4"):
        config = make_config({"preset": name})
        assert settle(config, T4) is config


def test_a_run_that_goes_on_keeps_its_preset() -> None:
    assert settle(make_config({}), CPU, "t4") == settle(make_config({}), T4)
    for stored in ("none", "auto"):
        untouched = settle(make_config({}), T4, stored)
        assert untouched == make_config({"preset": "none"})
    with pytest.raises(ConfigError, match="preset must be one of"):
        settle(make_config({}), T4, "t40")


@pytest.mark.parametrize("recipe", ["quickstart", None])
def test_on_a_cpu_nothing_changes_but_the_presets_name(recipe: str | None) -> None:
    config = make_config(load_recipe(RECIPES / f"{recipe}.yaml") if recipe else {})
    assert settle(config, CPU) == config.model_copy(update={"preset": "cpu"})


@pytest.mark.parametrize(
    ("machine", "slug"),
    [
        (T4, "tesla-t4"),
        (card("NVIDIA A100-SXM4-40GB", 39), "a100-sxm4-40gb"),
        (card("NVIDIA H100 80GB HBM3", 79), "h100-80gb-hbm3"),
        (card("", 4), "cuda"),
        (CPU, "cpu"),
    ],
    ids=lambda value: value.device_name if isinstance(value, Machine) else value,
)
def test_the_device_stands_in_the_runs_name(machine: Machine, slug: str) -> None:
    assert device_slug(machine) == slug
    for preset in ("auto", "none"):
        named = settle(make_config({"run_name": "marco-lora-{device}", "preset": preset}), machine)
        assert named.run_name == f"marco-lora-{slug}"
        assert RunConfig(run_name=named.run_name).run_name == named.run_name
    plain = make_config({"run_name": "marco"})
    assert name_run(plain, machine) is plain
