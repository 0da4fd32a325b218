"""What people are told to type next is what starts this very program."""

import subprocess
import sys
from pathlib import Path

import pytest

from dylora_moe.cli.show import command_name, printable


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "bin" / "dylora"
    file.parent.mkdir()
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_the_name_alone_where_the_shell_finds_it(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_name() == "dylora"


def test_its_path_where_the_shell_finds_none_or_another(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert command_name() == str(program)
    monkeypatch.chdir(program.parents[1])
    assert subprocess.run([command_name()], check=True).returncode == 0 and not Path(command_name()).is_absolute()
    other = program.parents[1] / "other"
    other.mkdir()
    (other / "dylora").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(other))
    assert command_name() == "bin/dylora"


def test_the_name_alone_when_started_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert command_name() == "dylora"


def test_what_steers_a_terminal_is_seen_and_not_obeyed() -> None:
    assert printable("a\x1b]0;owned\x07\tb\n\x9b2Jc") == "a\\x1b]0;owned\\x07\tb\n\\x9b2Jc"
    assert printable("plain, with \u00e4 and \U0001f600") == "plain, with \u00e4 and \U0001f600"
