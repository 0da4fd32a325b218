"""What is said about settings: all of them, from where they are declared; and what is remarked on."""

import re
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.config import Advice, GenerateConfig, RunConfig, explain, explain_all, load_recipe, make_config, remarks
from dylora_moe.config.explain import advice_of, shown
from dylora_moe.config.presets import PRESETS, SCENARIOS, with_preset
from dylora_moe.errors import ConfigError

SETTINGS = list(RunConfig.model_fields)
RANGED = [name for name in SETTINGS if explain(name).recommended]
# Settings without which another one may not have every value.
NEEDED: dict[str, dict[str, Any]] = {
    "early_stopping_patience": {"eval_steps": 100},
    "top_k": {"num_experts": 8},
    "lora_r": {"num_experts": 1},
}
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_an_explanation_has_all_that_is_declared() -> None:
    setting = explain("learning_rate")
    assert setting.group == "Training" and setting.default == 2e-4 and setting.recommended == "5e-05 to 0.0005"
    assert setting.meaning == RunConfig.model_fields["learning_rate"].description
    assert setting.allowed == "a number above 0"
    advice = advice_of("learning_rate")
    assert (setting.more, setting.less, setting.note) == (advice.more, advice.less, advice.note)
    assert explain("num_epochs").aliases == ("epochs", "num_train_epochs")


@pytest.mark.parametrize("name", ["num_epochs", "epochs", "--num-epochs", " NUM_EPOCHS ", "--num_train_epochs"])
def test_any_name_of_a_setting_is_explained(name: str) -> None:
    assert explain(name).name == "num_epochs"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'learning_rat'. Did you mean learning_rate\?"):
        explain("learning_rat")


def test_all_settings_are_explained_once_in_order() -> None:
    groups = explain_all()
    assert list(groups) == ["Model", "Data", "Skills", "Training", "Run", "Questions", "Generator", "Made data"]
    named = [setting.name for settings in groups.values() for setting in settings]
    assert named == [*SETTINGS, *GenerateConfig.model_fields]
    of_generation = [setting for group in ("Questions", "Generator", "Made data") for setting in groups[group]]
    assert all(setting.allowed and setting.meaning.endswith(".") for setting in of_generation)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_says_enough(name: str) -> None:
    setting = explain(name)
    assert advice_of(name) != Advice() and setting.allowed and setting.meaning.endswith(".")
    assert len(setting.meaning) < 240  # it is the flag's help
    kinds = str(RunConfig.model_fields[name].annotation)
    if re.search(r"\b(int|float)\b", kinds) and name not in ("seed", "domain_weights"):
        assert setting.more and setting.less and setting.note
    else:
        assert setting.note and not setting.more
    for text in (setting.more, setting.less, setting.unit):
        assert text == text.strip().rstrip(".") and text[:1].lower() == text[:1]
    assert not setting.note or setting.note.endswith(".")


@pytest.mark.parametrize("name", RANGED)
def test_a_recommended_range_can_be_had_and_holds_the_default(name: str) -> None:
    setting = explain(name)
    ends = [end for end in (setting.low, setting.high) if end is not None]
    kind = int if "int" in str(RunConfig.model_fields[name].annotation) else float
    assert ends == sorted(set(ends)) and all(kind(end) == end for end in ends)
    for end in ends:
        config = make_config({name: kind(end), **NEEDED.get(name, {})})
        assert [text for text in remarks(config, [name]) if "recommended" in text] == []
    # Zero is outside only where it does not switch the thing off.
    assert setting.low is None or setting.default in (None, 0) or setting.default >= setting.low
    assert setting.high is None or setting.default is None or setting.default <= setting.high


OUTSIDE = [
    (name, side)
    for name in RANGED
    for side, end in (("above", explain(name).high), ("below", explain(name).low))
    # sampling_temperature is refused below 1.
    if end is not None and (name, side) != ("sampling_temperature", "below")
]


@pytest.mark.parametrize(("name", "side"), OUTSIDE)
def test_a_value_outside_its_range_is_remarked_on(name: str, side: str) -> None:
    setting = explain(name)
    end, effect = (setting.high, setting.more) if side == "above" else (setting.low, setting.less)
    assert end is not None
    kind = int if "int" in str(RunConfig.model_fields[name].annotation) else float
    value = kind(end * (1.5 if side == "above" else 0.5))
    config = make_config({name: value, **NEEDED.get(name, {})})
    word = "highest" if side == "above" else "lowest"
    assert f"{name} {value:g} is {side} {end:g}, the {word} recommended: {effect}." in remarks(config)
    assert remarks(config, []) == []


def test_the_defaults_need_no_remark() -> None:
    assert remarks(make_config({})) == []
    assert [text for name in SETTINGS for text in remarks(make_config({}), [name]) if "recommended" in text] == []


def test_complete_settings_read_again_have_the_remarks_of_those_that_were_chosen() -> None:
    assert remarks(make_config(make_config({}).model_dump())) == []
    chosen = make_config({"seeding_ratio": 0.2, "learning_rate": 1, "run_name": "a"})
    assert len(remarks(chosen)) == 2 and remarks(make_config(chosen.model_dump())) == remarks(chosen)


@pytest.mark.parametrize("name", [*PRESETS, *SCENARIOS])
def test_no_preset_is_outside_of_what_is_recommended(name: str) -> None:
    flags = {"preset": name} if name in PRESETS else {"scenario": name}
    assert remarks(make_config(with_preset({}, flags))) == []


@pytest.mark.parametrize("name", ["lora_dropout", "warmup_ratio", "weight_decay", "z_coefficient", "sample_tokens"])
def test_zero_switches_a_thing_off_and_is_not_remarked_on(name: str) -> None:
    assert remarks(make_config({name: 0})) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, "warmup_ratio has no effect with lr_scheduler_type"),
        ({"seeding_ratio": 0.2}, "seeding_ratio has no effect with lr_scheduler_type cosine"),
        ({"consolidation_factor": 0.2}, "consolidation_factor has no effect"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end has no effect without eval_steps"),
        ({"metric_for_best_model": "eval_loss"}, "metric_for_best_model has no effect without eval_steps"),
        ({"temperature": 0.7}, "temperature has no effect in joint training"),
        (
            {"num_experts": 1, "granularity": "token", "z_coefficient": 1e-3},
            "granularity and z_coefficient have no effect",
        ),
        ({"num_experts": 1, "balance_coefficient": 0.02}, "balance_coefficient has no effect with num_experts 1"),
        ({"lora_r": 8, "lora_alpha": 64}, "lora_alpha 64 is 8 times lora_r 8, 1 to 4 is usual"),
        ({"lora_alpha": 8}, "lora_alpha 8 is 0.5 times lora_r 16"),
        ({"batch_size": 2}, "an effective batch of 2, 4 to 64 is usual: noisy gradients"),
        ({"batch_size": 16, "gradient_accumulation_steps": 8}, "an effective batch of 128"),
        ({"balance_coefficient": 0}, "balance_coefficient 0 lets the router"),
        ({"eval_steps": "epoch", "early_stopping_patience": 3}, "early_stopping_patience 3 cannot stop a run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_together_are_remarked_on(values: dict[str, Any], told: str) -> None:
    (remark,) = remarks(make_config(values))
    assert told in remark and remark.endswith(".")


@pytest.mark.parametrize(
    "values",
    [
        {"warmup_ratio": 0.1, "lr_scheduler_type": "constant_with_warmup"},
        {"warmup_ratio": 0, "lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "constant"},
        {"seeding_ratio": 0.2, "lr_scheduler_type": "two_phase"},
        {"load_best_model_at_end": True, "eval_steps": 100},
        {"load_best_model_at_end": False},
        {"num_experts": 1},
        {"lora_r": 8, "lora_alpha": 64, "use_rslora": True},
        {"lora_r": 8, "lora_alpha": 32},
        {"batch_size": 1, "gradient_accumulation_steps": 8},
        {"eval_steps": "epoch", "early_stopping_patience": 3, "num_epochs": 10},
        {"eval_steps": 100, "early_stopping_patience": 5},
    ],
    ids=str,
)
def test_sensible_settings_need_no_remark(values: dict[str, Any]) -> None:
    assert remarks(make_config(values)) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_need_no_remark(path: Path) -> None:
    assert remarks(make_config(load_recipe(path))) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not given"),
        (True, "true"),
        (2e-4, "0.0002"),
        (32.0, "32"),
        (("a", "b"), "a, b"),
        ([], "none"),
        ("x", "x"),
    ],
)
def test_values_as_people_read_them(value: object, text: str) -> None:
    assert shown(value) == text
