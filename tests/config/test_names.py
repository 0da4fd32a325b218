"""Names: a setting mistyped by one letter is suggested, other names lead to ours, names of no setting are answered."""

import random
import string

import pytest

from dylora_moe.config import ALIASES, RunConfig, unknown_dataset_key, unknown_setting, with_own_names
from dylora_moe.config.names import REPLACED, TRAINING, likely_settings
from dylora_moe.errors import ConfigError

SETTINGS = list(RunConfig.model_fields)
LETTERS = string.ascii_lowercase + string.digits + "_"


def one_letter_off(name: str, draw: random.Random | None) -> set[str]:
    """Every deletion and swap of neighbours; at every place a letter inserted and one put instead: drawn, or all."""
    found = set()
    for place in range(len(name) + 1):
        before, after = name[:place], name[place:]
        for letter in LETTERS if draw is None else [draw.choice(LETTERS)]:
            found |= {before + letter + after, before + letter + after[1:]}
        found |= {before + after[1:], before + after[1:2] + after[:1] + after[2:]}
    return {word for word in found if TRAINING.setting_named(word) is None}


def share_suggested(draw: random.Random | None) -> dict[str, float]:
    """For each setting the share of its misspellings that are answered with it and nothing else before it."""
    shares = {}
    for name in SETTINGS:
        words = one_letter_off(name, draw)
        right = [unknown_setting(word).partition("Did you mean ")[2].strip("?").split(" or ")[0] for word in words]
        shares[name] = sum(word == name for word in right) / len(words)
    return shares


def test_a_setting_with_one_wrong_letter_is_suggested() -> None:
    shares = share_suggested(random.Random(0))
    mean = sum(shares.values()) / len(shares)
    worst = min(shares, key=shares.__getitem__)
    print(f"right at first: {mean:.2%} over all settings, {shares[worst]:.2%} for {worst}")
    assert mean >= 0.95 and shares[worst] >= 0.8


@pytest.mark.slow
def test_every_misspelling_of_one_letter_by_any_letter() -> None:
    shares = share_suggested(None)
    assert sum(shares.values()) / len(shares) >= 0.99 and min(shares.values()) >= 0.95


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("Learning-Rate", ["learning_rate"]),
        ("LORA_R", ["lora_r"]),
        ("epchs", ["num_epochs"]),
        ("bp16", ["bf16", "fp16"]),
        ("warmup", ["warmup_ratio"]),
        ("patience", ["early_stopping_patience"]),
        ("quux", []),
        ("x", []),
        ("", []),
    ],
)
def test_what_a_name_is_likely_to_mean(word: str, expected: list[str]) -> None:
    assert likely_settings(word) == expected


def test_two_names_as_near_as_each_other_are_both_told() -> None:
    assert unknown_setting("bp16") == "there is no setting 'bp16'. Did you mean bf16 or fp16?"


def test_other_names_lead_to_settings_and_are_none() -> None:
    assert set(ALIASES.values()) <= set(SETTINGS)
    assert not (set(ALIASES) | set(REPLACED)) & set(SETTINGS) and not set(ALIASES) & set(REPLACED)


def test_values_get_our_names() -> None:
    assert with_own_names({"epochs": 3, "seed": 1}) == {"num_epochs": 3, "seed": 1}
    with pytest.raises(ConfigError, match="flags: pin_memory and dataloader_pin_memory are the same setting, got both"):
        with_own_names({"pin_memory": True, "dataloader_pin_memory": True}, where="flags")


@pytest.mark.parametrize("name", REPLACED)
def test_a_name_of_no_setting_is_answered_with_what_to_write(name: str) -> None:
    text = unknown_setting(name)
    assert text == f"there is no setting {name!r}. {REPLACED[name]}" and REPLACED[name].endswith(".")
    mentioned = {word.strip(":,.;") for word in REPLACED[name].split()} & set(SETTINGS)
    assert mentioned or "leave it out" in REPLACED[name]


def test_a_mistyped_key_of_a_data_set_is_suggested() -> None:
    assert unknown_dataset_key("num_exmaples").endswith("got 'num_exmaples'. Did you mean num_examples?")
    assert unknown_dataset_key("zzzz").endswith("got 'zzzz'.")
