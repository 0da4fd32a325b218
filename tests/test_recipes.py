"""Each recipe in the repository is a run that its settings allow."""

from pathlib import Path

import pytest

from dylora_moe.config import load_recipe, make_config
from dylora_moe.data.sources import check_path, parse_dataset_spec

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert FOLDER / "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid(path: Path) -> None:
    config = make_config(load_recipe(path), where=str(path))
    for dataset in config.datasets:
        spec = parse_dataset_spec(dataset)
        assert spec.name or spec.path
        if spec.name is None:
            check_path(spec)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_run_is_named_as_its_recipe(path: Path) -> None:
    assert load_recipe(path).get("run_name", path.stem) == path.stem
