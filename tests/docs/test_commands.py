"""Every `dylora ...` on any page is a command that the program takes, and every block of Python is Python."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from tests.config.test_settings_page import parse_command

from dylora_moe.cli.main import dylora

ROOT = Path(__file__).resolve().parents[2]
# The log and the settings page also tell what was, and what is theirs.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.yaml"))]
PAGES = [page for page in PAGES if page.name not in ("log.md", "settings.md")]


def commands_of(text: str) -> set[str]:
    """Lines of blocks that begin with it, and what is set apart within a line; pipes and what follows are cut off."""
    joined = text.replace("\\\n", " ")
    found = set(re.findall(r"^(?:\w+=\S+ |#\s+(?:command +)?)?(dylora [^\n]*)$", joined, re.MULTILINE))
    found |= set(re.findall(r"`(dylora [^`\n]+)`", text))
    # A tool's output, or words beside the command in a block that is not run, stand after two blanks.
    return {re.split(r" {2,}| [|>&#;] ?|, or: ", command)[0].strip() for command in found if "..." not in command}


COMMANDS = sorted(
    {(page.relative_to(ROOT).as_posix(), each) for page in PAGES for each in commands_of(page.read_text())}
)


@pytest.mark.parametrize(("page", "command"), [pair for pair in COMMANDS if "VERB" not in pair[1]])
def test_a_command_is_taken(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders that it names need not be there."""

    def convert(self: click.Path, value: Any, *_: Any) -> Any:
        return Path(value)

    monkeypatch.setattr(click.Path, "convert", convert)
    words = shlex.split(command, comments=True)[1:]
    try:
        parse_command(dylora, words)
    except click.exceptions.Exit:
        assert words[-1] == "--help"
    except click.MissingParameter:
        assert len(words) <= 2 and not any(word.startswith("-") for word in words)  # a verb that is spoken of


@pytest.mark.parametrize("command", ["dylora fly", "dylora train --no_such_flag 1", "dylora evaluate --json"])
def test_a_command_that_is_none_is_seen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((click.ClickException, AssertionError)):
        test_a_command_is_taken("", command, monkeypatch)


def test_there_are_many() -> None:
    assert len(COMMANDS) > 120 and len({page for page, _ in COMMANDS}) > 25


def test_python_on_the_pages_is_python() -> None:
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            compile(block, f"{page.name}, block {number + 1}", "exec")


def test_the_sandbox_page_runs() -> None:
    from dylora_moe.errors import SandboxError
    from dylora_moe.sandbox import find_sandbox

    try:
        find_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sandbox.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/sandbox.md", "exec"), names)
    assert (names["outcome"].ended, names["outcome"].stdout) == ("passed", "42\n")
