"""`dylora generate`: what it prints, and what a recipe and flags may say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.generate.conftest import serve

__all__ = ["serve"]

Run = Callable[..., Any]
ODD = "[/b] beginner (A1)"


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """(**changes) -> a recipe of five questions, with levels of odd names."""
    pack = tmp_path / "pack"
    pack.mkdir()
    level = {"rows": 3, "max_tokens": 20, "temperature": 0.7}
    (pack / "pack.yaml").write_text(yaml.safe_dump({"levels": {ODD: level, "two": level}}), encoding="utf-8")
    texts = {"instructions": "{{ level }}", "question": "{{ question }}", "again": "{{ question }} {{ reasons }}"}
    for name, text in texts.items():
        (pack / f"{name}.txt").write_text(text, encoding="utf-8")
    rows = [{"text": f"Come si dice {number}?"} for number in range(5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(**changes: Any) -> Path:
        values = {"questions": [str(tmp_path / "questions.jsonl")], "prompts": str(pack), "generator": "stub"}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "runs")} | changes), encoding="utf-8")
        return path

    return write


def test_a_plan_is_shown_and_nothing_is_asked(dylora: Run, made: Callable[..., Path], tmp_path: Path) -> None:
    plan = dylora("generate", made(), "--dry-run", "--json").json()
    assert plan["rows"] == 6 and plan["levels"][ODD] == {"questions.jsonl": 3}
    assert plan["sent"]["two"][0] == {"role": "system", "content": "two"}
    shown = dylora("generate", made(), "--dry-run", "--total", "4")
    assert shown.code == 0 and ODD in shown.out and not (tmp_path / "runs").exists()


def test_a_generation_is_shown_and_given_as_json(
    dylora: Run, made: Callable[..., Path], serve: Callable[..., str]
) -> None:
    url, judge = serve(), serve(says="two")
    recipe = made()
    found = dylora("generate", recipe, "--endpoints", url, "--json").json()
    assert found["rows"]["passed"] == 6 and list(found["levels"]) == [ODD, "two"]
    again = dylora("generate", recipe, "--endpoints", url)
    assert again.code == 0 and ODD in again.out and "6 of 6 rows passed" in again.out
    refused = dylora("generate", recipe, "--endpoints", url, "--judge", "j", "--judge_endpoints", judge)
    assert refused.code != 0 and "judge.txt" in refused.err
    (Path(yaml.safe_load(recipe.read_text())["prompts"]) / "judge.txt").write_text("{{ answer }}", encoding="utf-8")
    judged = dylora("generate", recipe, "--endpoints", url, "--judge", "j", "--judge_endpoints", f"{judge},{judge}")
    assert judged.code == 0 and "j judged 6 answers; of 0 it named no level" in " ".join(judged.out.split())


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "http://", "http://a b/v1", "http://[::1", "http://h:99999/v1", "ftp://h/v1"]
)
def test_an_address_that_is_none_is_refused(dylora: Run, made: Callable[..., Path], url: str) -> None:
    refused = dylora("generate", made(), "--endpoints", url)
    assert refused.code != 0 and "addresses such as http://localhost:8000/v1" in " ".join(refused.err.split())


def test_an_address_with_a_password_is_refused_and_not_shown(dylora: Run, made: Callable[..., Path]) -> None:
    refused = dylora("generate", made(), "--endpoints", "http://user:hunter2@h/v1")
    assert refused.code != 0 and "without a name or a password" in " ".join(refused.err.split())
    assert "hunter2" not in refused.err + refused.out


def test_a_language_that_cannot_be_told_is_refused(dylora: Run, made: Callable[..., Path], tmp_path: Path) -> None:
    recipe = made()
    pack = tmp_path / "pack" / "pack.yaml"
    pack.write_text(pack.read_text(encoding="utf-8") + "answers_in: xx\n", encoding="utf-8")
    refused = dylora("generate", recipe, "--dry-run")
    assert refused.code != 0 and "must be a language that can be told, got 'xx'" in " ".join(refused.err.split())


def test_prompts_are_written_once(dylora: Run, tmp_path: Path) -> None:
    assert dylora("generate", "--write-prompts", tmp_path / "mine").code == 0
    assert (tmp_path / "mine" / "judge.txt").is_file()
    assert dylora("generate", "--write-prompts", tmp_path / "mine").code != 0
