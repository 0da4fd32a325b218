"""`dylora config show`, `explain` and `schema`: light, the same as what a run gets, for people and for programs."""

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tests.cli.conftest import finish, start_python

from dylora_moe.cli.config import _MODULES, command
from dylora_moe.config import ALIASES, GenerateConfig, RunConfig, explain, load_recipe, make_config
from dylora_moe.config.explain import render_markdown
from dylora_moe.errors import ConfigError

LIGHT = """
import sys
from dylora_moe.cli.config import command
command(sys.argv[1:], standalone_mode=False)
print([name for name in ("torch", "transformers", "peft", "datasets", "numpy") if name in sys.modules], file=sys.stderr)
"""


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(command, list(arguments), catch_exceptions=False)


def printed(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        'epochs: 5\nlearning_rate: 0.01\ndatasets: [a.jsonl, {path: b.jsonl, domain: "\u00e9"}]\n'
        'domain_weights: {a: 2, "\u00e9": 1}\noutput_dir: "two\\nlines"\nchat_template: "a # b"\n'
    )
    return path


@pytest.mark.parametrize("arguments", [["show"], ["explain", "seed"], ["schema"], ["--help"]], ids=" ".join)
def test_settings_are_shown_without_heavy_imports(arguments: list[str]) -> None:
    out, err = finish(start_python(LIGHT, *arguments))
    assert out and ast.literal_eval(err.strip()) == []


def test_what_is_shown_is_a_recipe_that_makes_the_same_run(recipe: Path, tmp_path: Path) -> None:
    text = printed("show", str(recipe), "--preset", "t4", "--scenario", "debug", "--lora-alpha", "16")
    assert list(yaml.safe_load(text)) == list(RunConfig.model_fields)
    (again := tmp_path / "again.yaml").write_text(text)
    config = make_config(load_recipe(again))
    assert config.preset == "t4" and config.batch_size == 1 and config.lora_alpha == 16 and config.num_epochs == 1
    assert str(config.output_dir) == "two\nlines" and config.chat_template == "a # b"
    assert json.loads(printed("show", str(recipe), "--json"))["settings"] == make_config(
        load_recipe(recipe) | {"run_name": "mine"}
    ).model_dump(mode="json")


def test_what_differs_from_the_default_is_marked_and_nothing_else(recipe: Path) -> None:
    lines = printed("show", str(recipe)).splitlines()
    assert "num_epochs: 5.0  # default: 3" in lines and "lora_alpha: 32.0" in lines
    assert "run_name: mine  # default: run" in lines
    assert "datasets:  # default: requests, stripe, flask" in lines
    assert sum("# default: " in line for line in lines) == 7
    assert "# default" not in printed("show")
    changed = {"num_epochs", "learning_rate", "datasets", "domain_weights", "output_dir", "chat_template", "run_name"}
    assert set(json.loads(printed("show", str(recipe), "--json"))["changed"]) == changed


def test_remarks_are_shown(recipe: Path) -> None:
    remark = "learning_rate 0.01 is above 0.0005, the highest recommended: "
    assert f"\n# {remark}" in printed("show", str(recipe))
    (told,) = json.loads(printed("show", str(recipe), "--json"))["remarks"]
    assert told.startswith(remark)


def test_a_wrong_setting_is_told_as_in_training(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="lora_r must be a whole number of at least 1, got 0"):
        run("show", str(recipe), "--lora_r", "0")
    assert "Did you mean --lora_r?" in run("show", "--lora_rr", "1").stderr


@pytest.mark.parametrize("name", ["learning_rate", "--learning-rate", "eval_steps", "epochs", "report_to"])
def test_a_setting_is_explained_whole(name: str) -> None:
    setting = explain(name)
    text = " ".join(printed("explain", name).split())
    for part in (
        setting.name,
        setting.meaning,
        setting.allowed,
        setting.unit,
        setting.more,
        setting.less,
        setting.note,
    ):
        assert part in text
    assert setting.recommended in text and ", ".join(setting.aliases) in text and f"--{setting.name}" in text
    record = json.loads(printed("explain", name, "--json"))
    assert record["name"] == setting.name and record["note"] == setting.note and record["low"] == setting.low
    assert record["recommended"] == setting.recommended and record["default"] == setting.default


def test_without_a_name_every_setting_is_listed_by_group() -> None:
    text = printed("explain")
    assert [line.strip() for line in text.splitlines() if line[:1].isalpha()] == [
        "Model",
        "Data",
        "Skills",
        "Training",
        "Run",
        "Questions",
        "Generator",
        "Made data",
    ]
    records = json.loads(printed("explain", "--json"))
    assert [record["name"] for record in records] == [*RunConfig.model_fields, *GenerateConfig.model_fields]
    assert all(f" {name} " in text for name in RunConfig.model_fields)


def test_an_unknown_name_is_answered_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean learning_rate\?"):
        run("explain", "learnin_rate")


def test_the_tables_of_the_page_are_printed() -> None:
    assert printed("explain", "--markdown") == render_markdown()
    assert render_markdown().count("\n| `") == len(RunConfig.model_fields) + len(GenerateConfig.model_fields)


def test_the_schema_knows_every_setting_and_other_names_and_no_more() -> None:
    schema = json.loads(printed("schema"))
    properties: dict[str, Any] = schema["properties"]
    assert set(properties) == {*RunConfig.model_fields, *ALIASES} and schema["additionalProperties"] is False
    assert properties["lora_r"]["minimum"] == 1 and properties["overlong"]["enum"][0] == "error"
    assert properties["epochs"]["type"] == "number" and "num_epochs" in properties["epochs"]["description"]
    assert all(properties[name]["description"] for name in properties)


def test_the_group_lists_all_commands_and_imports_the_other_ones_when_asked() -> None:
    text = printed("--help")
    assert all(f"  {name} " in text for name in ("show", "explain", "schema", "presets", "targets"))
    for name, (module, _) in _MODULES.items():
        assert importlib.util.find_spec(f"dylora_moe.cli.{module}"), module
        assert "Usage: " in printed(name, "--help")
    assert run("fly").exit_code == 2
