"""`dylora data inspect`: counts equal to the files', tokens as they are trained, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


def test_a_recipe_is_shown_and_nothing_is_trained(
    dylora: Callable[..., Any], tiny_settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    settings = tiny_settings()
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(settings, default=str))))
    before = sorted(tmp_path.rglob("*"))
    outcome = dylora("data", "inspect", recipe, "--json", "--samples", 2)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    for entry, domain in zip(settings["datasets"], found["domains"], strict=True):
        rows = Path(entry["path"]).read_text().splitlines()
        assert domain["domain"] == entry["domain"]
        assert domain["num_train"] + domain["num_validation"] + sum(domain["removed"].values()) == len(rows)
        assert sum(domain["lengths"]["histogram"]) == domain["num_train"] + domain["num_validation"]
        answers = {json.loads(row)["completion"] for row in rows}
        for tokens in found["samples"][entry["domain"]]:
            learned = "".join(token["text"] for token in tokens if token["is_learned"])
            assert learned.removesuffix("<eos>") in answers and learned.endswith("<eos>")
        assert len(found["samples"][entry["domain"]]) == 2
    assert "Tokens a row" in outcome.err and "\u00ab" in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_is_written_where_nothing_is(
    dylora: Callable[..., Any], tiny_settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe, page = tmp_path / "mine.yaml", tmp_path / "data.html"
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(tiny_settings(), default=str))))
    outcome = dylora("data", "inspect", recipe, "--html", page)
    assert outcome.code == 0 and f"Written to {page}" in outcome.out + outcome.err
    text = page.read_text(encoding="utf-8")
    assert text.count('class="token learned special"') == 3 * text.count("<h2>") > 0
    outcome = dylora("data", "inspect", recipe, "--html", page)
    assert outcome.code == 2 and "must be a new file" in outcome.err and page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["missing/data.html", "x" * 300, "link.html"])
def test_a_page_that_cannot_be_written_is_told_first(dylora: Callable[..., Any], tmp_path: Path, name: str) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "nowhere" / "data.html")
    outcome = dylora("data", "inspect", "--base_model", "no-such-base", "--html", tmp_path / name)
    assert outcome.code == 2 and "--html must be a" in outcome.err


def test_a_bad_recipe_is_told(dylora: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("datasets: [nowhere.jsonl]\nmax_lenght: 8\n")
    outcome = dylora("data", "inspect", recipe)
    assert outcome.code == 1 and f"{recipe}:2: there is no setting 'max_lenght'" in outcome.err
