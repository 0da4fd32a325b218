"""Recipes: read with file and line, errors in one sentence, written back whole."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.config.test_settings import ALL_CHANGED, ALONE, REFUSED, SETTINGS

from dylora_moe.config import RunConfig, load_recipe, make_config, split_list, to_yaml
from dylora_moe.errors import ConfigError


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


def test_written_settings_make_the_same_run_again(recipe: Any) -> None:
    config = make_config(ALL_CHANGED)
    default = RunConfig()
    assert [name for name in SETTINGS if getattr(config, name) == getattr(default, name)] == [
        name for name in SETTINGS if name in (*ALONE, *REFUSED)
    ]
    text = to_yaml(config)
    assert list(yaml.safe_load(text)) == SETTINGS
    assert make_config(load_recipe(recipe(text))) == config
    assert make_config(load_recipe(recipe(to_yaml(default)))) == default
    for name, value in ALONE.items():
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
    assert "mine.yaml:1:" in text and "Did you mean" not in text and "dylora config explain" in text


def test_an_unknown_setting_without_a_recipe_is_refused_too() -> None:
    text = message(make_config, {"top_kk": 1}, where="flags")
    assert text.startswith("flags: ") and "Did you mean top_k?" in text


@pytest.mark.parametrize(
    ("entry", "line", "told"),
    [
        ("{skill: a, datasets: [flask], rank: 8}", 3, "a key of a skills entry must be one of skill, datasets"),
        ("{skill: a, skill: b, datasets: [flask]}", 3, "skill stands here a second time"),
        ("{path: a.jsonl, part: 1/2, part: 2/2}", 3, "part stands here a second time"),
        ("{path: a.jsonl, pat: 1/2}", 3, "Did you mean path or part?"),
        ("skill: a\n    datasets:\n      - {pth: a}", 5, "a key of a datasets entry must be one of"),
    ],
)
def test_keys_of_skills_are_checked_with_their_line(recipe: Any, entry: str, line: int, told: str) -> None:
    path = recipe(f"mode: continual\nskills:\n  - {entry}\n")
    text = message(load_recipe, path)
    assert f"{path}:{line}:" in text and told in text


def test_keys_that_stand_elsewhere_may_be_merged(recipe: Any) -> None:
    text = "mode: continual\nskills:\n  - &one {skill: a, datasets: [flask], lora_r: 8}\n  - {<<: *one, skill: b}\n"
    assert load_recipe(recipe(text))["skills"][1] == {"skill": "b", "datasets": ["flask"], "lora_r": 8}


def test_a_key_twice_is_refused_with_the_second_line(recipe: Any) -> None:
    path = recipe("seed: 1\nlora_r: 8\nseed: 2\n")
    text = message(load_recipe, path)
    assert f"{path}:3:" in text and "seed" in text and "second time" in text


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("granularity", "toekn", "must be token or sequence, got 'toekn' (did you mean token?)"),
        ("granularity", "Token", "got 'Token' (did you mean token?)"),
        ("lr_scheduler_type", "cosin", "got 'cosin' (did you mean cosine?)"),
        ("eval_steps", "epcoh", "got 'epcoh' (did you mean epoch?)"),
        ("granularity", "by the moon", "got 'by the moon'"),
        ("learning_rate", "token", "got 'token'"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_one_meant(name: str, value: str, told: str) -> None:
    assert message(make_config, {name: value}).endswith(told)


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


def test_a_flag_of_several_values() -> None:
    assert split_list("a, b,,c ") == ["a", "b", "c"]
    assert split_list("") == []


def test_an_unknown_key_of_a_data_set_is_refused_with_its_line(recipe: Any) -> None:
    path = recipe("seed: 1\ndatasets:\n  - mbpp\n  - path: a.jsonl\n    domian: sql\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert f"{path}:5: " in str(caught.value) and "got 'domian'. Did you mean domain?" in str(caught.value)


def test_another_name_of_a_setting_serves_in_a_recipe(recipe: Any) -> None:
    values = load_recipe(recipe("epochs: 5\nper_device_train_batch_size: 2\npin_memory: false\n"))
    assert values == {"num_epochs": 5, "batch_size": 2, "dataloader_pin_memory": False}
    assert make_config({"epochs": 5}).num_epochs == 5


def test_two_names_of_one_setting_are_refused_with_the_second_line(recipe: Any) -> None:
    path = recipe("seed: 1\nepochs: 5\nnum_epochs: 5\n")
    assert f"{path}:3: epochs and num_epochs are the same setting, got both." in message(load_recipe, path)
    assert "epochs and num_epochs are the same" in message(make_config, {"epochs": 1, "num_epochs": 1})


def test_a_name_from_elsewhere_says_what_to_write(recipe: Any) -> None:
    path = recipe("seed: 1\nevaluation_strategy: steps\n")
    assert f"{path}:2: there is no setting 'evaluation_strategy'. Write eval_steps" in message(load_recipe, path)
