"""docs/features.md: every command parses, every page is there, and no row is without."""

import re
import shlex
from pathlib import Path

import click
import pytest
from tests.config.test_settings_page import parse_command

from dylora_moe.cli.main import dylora

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "features.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| feature"))
]
COMMANDS = sorted({row[2].strip("`") for row in ROWS})


def test_the_tables_are_read_whole() -> None:
    assert len(ROWS) > 55 and all(len(row) == 4 for row in ROWS)
    assert {source for row in ROWS for source in row[1].split(", ")} == set("RJGAD")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs that commands need are there, as empty folders."""
    for name in ("quickstart", "more", "continual", "teacher_generate", "proof_of_concept"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command)
    assert program == "dylora"
    parse_command(dylora, words)


def test_a_command_that_is_none_is_seen() -> None:
    with pytest.raises((click.ClickException, AssertionError)):
        parse_command(dylora, ["train", "--no_such_flag"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_page_is_there(row: list[str]) -> None:
    (page,) = re.findall(r"\]\(([^)#]+)\)", row[3])
    assert (PAGE.parent / page).is_file()
