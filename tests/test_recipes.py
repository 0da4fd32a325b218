"""Each recipe in the repository is a run that its settings allow, and its header says how to start it."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.cli.generate import command as generate
from dylora_moe.cli.train import command as train
from dylora_moe.config import GENERATION, TRAINING, RunConfig, load_recipe, make_config, make_generate_config
from dylora_moe.config.presets import PRESETS, Machine, settle, with_preset
from dylora_moe.data.registry import REGISTRY, registry_of
from dylora_moe.data.sources import check_path, parse_dataset_spec
from dylora_moe.generate.families import check_families

FOLDER = Path(__file__).parents[1] / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
GENERATIONS = [path for path in FILES if path.stem.startswith("generate")]
RECIPES = [path for path in FILES if path not in GENERATIONS]
HEADER = ["command", "hardware", "time", "result", "source"]
DEVICE = "-{device}"

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def name_of(path: Path) -> str:
    """That of the recipe's run: its path under the folder."""
    return "_".join(path.relative_to(FOLDER).with_suffix("").parts)


def config_of(path: Path) -> RunConfig:
    return make_config(with_preset(load_recipe(path), {}), where=str(path))


def header(path: Path) -> dict[str, str]:
    """Word -> what the header says under it."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = "\n".join(lines).partition("\n#\n")[2]
    parts = re.split(r"^# (\w+) {2,}", comment, flags=re.MULTILINE)[1:]
    return {word: text.strip() for word, text in zip(parts[::2], parts[1::2], strict=True)}


def test_those_of_the_founding_documents_are_there() -> None:
    names = "continual full memory_limited poc production proof_of_concept quick_test quickstart"
    assert {name_of(path) for path in FILES} >= {*names.split(), "olora_1", "olora_2", "olora_3"}
    assert {name_of(path) for path in FILES} >= {"teacher_generate", "teacher_train"}


def data_sets(config: RunConfig) -> list[Any]:
    """Entries of `datasets`, or of all `skills`."""
    if config.mode == "joint":
        return list(config.datasets)
    return [part for skill in config.skills for part in (skill["datasets"] if isinstance(skill, dict) else [skill])]


@each_recipe
def test_a_recipe_is_valid(path: Path) -> None:
    config = config_of(path)
    registry = registry_of(config.data_registry)
    for dataset in data_sets(config):
        spec = parse_dataset_spec(dataset, registry)
        if spec.path is not None and spec.path.startswith("data/"):
            assert spec.path.rpartition("/")[0] in header(path)["source"]  # says where it comes from
        elif spec.name is None:
            check_path(spec)
        else:
            # A path beside the name of what is on a hub would be one on the machine of whoever wrote the recipe.
            assert (spec.path is not None) == (registry[spec.name].kind == "file" and spec.name in REGISTRY)


@pytest.mark.parametrize("path", GENERATIONS, ids=lambda path: path.stem)
def test_a_recipe_of_data_is_valid(path: Path) -> None:
    config = make_generate_config(load_recipe(path, GENERATION), where=str(path))
    check_families(config.generator, config.for_base, allowed=False)
    training = config_of(path.with_name(path.name.replace("generate", "train")))
    made = {entry["path"] for entry in training.data_registry.values()} if training.data_registry else set()
    assert made == {f"{config.run_dir}/data"} and training.base_model == config.for_base


@each_file
def test_a_run_is_named_as_its_recipe(path: Path) -> None:
    kind = GENERATION if path in GENERATIONS else TRAINING
    assert load_recipe(path, kind).get("run_name", path.stem).removesuffix(DEVICE) == name_of(path)


@each_file
def test_a_header_says_what_a_newcomer_asks(path: Path) -> None:
    said = header(path)
    assert list(said)[: len(HEADER)] == HEADER and all(said.values())
    assert path.read_text(encoding="utf-8").startswith("# ")


@each_file
def test_the_command_of_a_header_starts_this_recipe(path: Path) -> None:
    found = re.search(r"dylora ((?:train|generate) \S+)", header(path)["command"])
    assert found is not None
    verb, *arguments = shlex.split(found[1])
    context = {"train": train, "generate": generate}[verb].make_context(verb, arguments)
    assert context.params["recipe"] == path.relative_to(FOLDER.parent)


@each_recipe
@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_recipe_runs_with_every_preset(path: Path, preset: str) -> None:
    plain = config_of(path)
    suited = make_config(with_preset(load_recipe(path), {"preset": preset}))
    assert (
        suited.batch_size * suited.gradient_accumulation_steps == plain.batch_size * plain.gradient_accumulation_steps
    )
    assert suited.batch_size <= PRESETS[preset].micro_batch


def test_the_figures_of_the_founding_documents() -> None:
    expected = {
        "proof_of_concept": {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "early_stopping_patience": 5},
        "full": {"lora_r": 16, "lora_alpha": 32, "eval_steps": "epoch", "early_stopping_patience": 3, "bf16": True},
        "teacher/train": {"num_epochs": 3, "save_steps": 500, "eval_steps": 100, "logging_steps": 10}
        | {"save_total_limit": 3, "warmup_ratio": 0.03, "weight_decay": 0.01, "learning_rate": 2e-4},
        "quick_test": {"batch_size": 2, "num_epochs": 3, "gradient_accumulation_steps": 8, "learning_rate": 2e-4},
        "production": {"batch_size": 4, "num_epochs": 20, "gradient_accumulation_steps": 16, "learning_rate": 1e-4},
        "memory_limited": {"batch_size": 2, "gradient_accumulation_steps": 32, "max_length": 768}
        | {"gradient_checkpointing": True},
    }
    for name, values in expected.items():
        config = config_of(FOLDER / f"{name}.yaml").model_dump()
        assert {setting: config[setting] for setting in values} == values, name
        assert config["load_best_model_at_end"] and config["lr_scheduler_type"] == "cosine"


def test_the_italian_teacher_suits_the_cards_of_its_document() -> None:
    config = config_of(FOLDER / "teacher" / "train.yaml")
    t4 = Machine(device_name="Tesla T4", memory_bytes=15_600_000_000, kind="cuda", has_bf16=False)
    on_t4 = settle(config, t4)
    assert (on_t4.batch_size, on_t4.gradient_accumulation_steps, on_t4.eval_batch_size) == (1, 8, 1)
    assert on_t4.fp16 and on_t4.run_name == "teacher_train-tesla-t4"
