"""docs/settings.md: what is ours there parses, nothing of the founding documents is missing, tables are current."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from dylora_moe.cli.main import dylora
from dylora_moe.cli.settings import config_of
from dylora_moe.config import RunConfig, make_config
from dylora_moe.config.explain import render_markdown

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
SEEDS = REPOSITORY.parent / "shared" / "seeds"
ENVIRONMENT = {"HF_TOKEN", "WANDB_API_KEY"}


def rows() -> list[tuple[str, str, str]]:
    """(theirs, ours, remark) of every row of the tables about the founding documents."""
    text = PAGE.partition("## From the founding documents")[2].partition("## All settings")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:3] == "| `"]
    assert all(len(row) in (2, 3) for row in cells), [row for row in cells if len(row) not in (2, 3)]
    return [(row[0], row[1].removesuffix(" |"), row[2] if len(row) == 3 else "") for row in cells]


OURS = [text for _, ours, _ in rows() for text in re.findall(r"`([^`]+)`", ours)]


def parse_command(group: click.Group, words: list[str]) -> dict[str, object]:
    """A command's own values, parsed by click as when it runs; it is not run."""
    with group.make_context("dylora", words, resilient_parsing=False) as context:
        left = [*context._protected_args, *context.args]
        if not left and group.invoke_without_command:
            return dict(context.params)
        name, part, rest = group.resolve_command(context, left)
        assert part is not None, name
        if isinstance(part, click.Group):
            return parse_command(part, rest)
        with part.make_context(name, rest) as inner:
            return dict(inner.params)


def check(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a piece of the middle column as what it is."""
    monkeypatch.chdir(REPOSITORY)
    program, *words = shlex.split(text)
    if program == "dylora":
        values = parse_command(dylora, words)
        config_of(values.pop("recipe", None), values)  # pyright: ignore[reportArgumentType]
    elif program.startswith("--"):
        check(f"dylora train {text}", monkeypatch)
    elif program == "make":
        assert re.search(rf"^{words[0]}:", Path("Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        assert words == ["install", "-e", "."]
    elif text not in ENVIRONMENT:
        values = yaml.safe_load(text)
        assert isinstance(values, dict) and set(values) <= set(RunConfig.model_fields), text
        make_config(values)


@pytest.mark.parametrize("text", OURS)
def test_each_of_ours_parses(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(text, monkeypatch)


@pytest.mark.parametrize("text", ["dylora train --no_such_flag 1", "dylora fly", "--epohs 3", "batch_sizes: 3", "word"])
def test_what_does_not_parse_is_seen(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((click.ClickException, ValueError, AssertionError)):
        check(text, monkeypatch)


def test_the_tables_are_read_whole() -> None:
    assert len(rows()) > 100 and len(OURS) > 90
    assert "dylora train recipes/full.yaml --bf16 --num_epochs 10" in OURS


@pytest.mark.parametrize("row", [row for row in rows() if row[1] == "-"], ids=lambda row: row[0])
def test_a_dash_has_a_reason(row: tuple[str, str, str]) -> None:
    assert len(row[2]) >= len("the same")


def written_there() -> set[str]:
    """Flags, names that are assigned or set apart, commands, variables: of all five founding documents."""
    found = set[str]()
    for path in sorted(SEEDS.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
        code = "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])
        found |= set(re.findall(r"--([a-z][a-z_0-9]+)", text))
        found |= set(re.findall(r"\b([A-Za-z]\w*) ?=(?!=)", code)) | set(re.findall(r"`([a-z_0-9]+)`", text))
        found |= set(re.findall(r"\b(r|alpha|dropout)=[\d.]", text))
        found |= set(re.findall(r"[\w/.]+_(?:training|train|push)\.(?:py|sh)|\btrain\.py", text))
        found |= set(re.findall(r"docker (?:run|pull)|pip install|git clone", text))
    return found


# Names in code that are no settings: a citation's fields, and variables of examples.
NO_SETTINGS = {"title", "author", "year", "howpublished"}


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the founding documents are not beside the repository")
def test_no_command_or_setting_of_the_founding_documents_is_missing() -> None:
    theirs = "\n".join(row[0] for row in rows())
    names = written_there() - NO_SETTINGS
    assert len(names) > 50
    assert sorted(name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", theirs)) == []


def test_the_tables_of_all_settings_are_those_of_the_code() -> None:
    _, marker, tables = PAGE.partition("\n### Model\n")
    rewrite = next(line for line in PAGE.splitlines() if "explain --markdown >>" in line)
    assert marker.lstrip() + tables == render_markdown(), f"the page is not as the code says; rewrite it: {rewrite}"
