"""A panel on a real pseudo terminal: lines scroll above it, failures are told once, the cursor is never lost."""

import io
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text
from tests.train.terminal import Terminal, panels, until

from dylora_moe.train.live.screen import Screen, can_draw


def numbered(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("line ")]


class Drawing:
    """Counts how often it is drawn, and fails from the so many-th time on."""

    def __init__(self, fails: int | None = None) -> None:
        self.times, self.fails = 0, fails

    def __call__(self, width: int, height: int) -> RenderableType:
        self.times += 1
        if self.fails is not None and self.times >= self.fails:
            raise ValueError("no such figure")
        return Panel(Text(f"{width} x {height}, picture {self.times}"))


def test_lines_scroll_above_the_panel_and_all_of_them_stay() -> None:
    terminal, drawing = Terminal(60, 12), Drawing()
    console = terminal.console()
    screen = Screen(console, drawing)
    assert not screen.is_on
    screen.open()
    for number in range(200):
        console.print(f"line {number}")
    until(lambda: drawing.times >= 3)  # by itself
    screen.close()
    console.print("line at the end")
    lines = terminal.finish()
    assert numbered(lines) == [*(f"line {number}" for number in range(200)), "line at the end"]
    (panel,) = panels(lines)  # the last one, once
    assert f"58 x 12, picture {drawing.times}" in panel[1]
    assert drawing.times < 50  # lines draw nothing
    assert terminal.cursor_is_shown and not screen.is_on


def test_keys_that_the_terminal_writes_into_a_picture_leave_none_behind() -> None:
    terminal = Terminal(60, 12)
    console = terminal.console()
    write, presses = console.file.write, [True]

    def interrupted(text: str) -> int:
        first, newline, rest = text.partition("\n")
        if "picture 2" not in text or not presses:
            return write(text)
        presses.clear()
        write(first + newline)
        console.file.flush()
        terminal.wait_for(first[-10:])
        terminal.type(b"\x03")  # no process has this terminal: it is only written
        terminal.wait_for("^C")
        return write(rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.file, "write", interrupted)
        screen = Screen(console, Drawing())
        screen.open()
        terminal.wait_for("picture 3")
        screen.close()
    assert not presses and len(panels(terminal.finish())) == 1


def test_the_cursor_is_shown_all_the_time() -> None:
    terminal = Terminal()
    screen = Screen(terminal.console(), Drawing())
    screen.open()
    terminal.wait_for("picture 2")
    assert terminal.cursor_is_shown
    screen.close()


@pytest.mark.parametrize("fails", [1, 3])
def test_a_failure_is_told_once_and_takes_the_panel_away(fails: int) -> None:
    terminal, drawing = Terminal(), Drawing(fails)
    console = terminal.console()
    screen = Screen(console, drawing)
    screen.open()
    until(lambda: not screen.is_on)
    until(lambda: all(thread.name != "live-view" for thread in threading.enumerate()))
    console.print("line after")
    screen.fail(ValueError("again"))
    screen.close()
    lines = terminal.finish()
    told = "The live view failed and is off: ValueError('no such figure'). Training goes on."
    assert [line for line in lines if "live view" in line] == [told] and lines.count("line after") == 1
    assert panels(lines) == [] and drawing.times == fails
    assert terminal.cursor_is_shown


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    ours, theirs = os.openpty()
    drawing = Drawing()
    console = Console(file=os.fdopen(theirs, "w"), width=80, height=24, _environ={"TERM": "xterm"})
    screen = Screen(console, drawing)
    screen.open()
    os.close(ours)
    with pytest.raises(OSError):
        os.write(theirs, b"to nobody")
    until(lambda: drawing.times >= 4 or not screen.is_on)
    screen.close()
    assert not screen.is_on
    with suppress(OSError):
        console.file.close()


def test_a_line_can_be_posted_from_a_signal_handler() -> None:
    terminal = Terminal()
    console = terminal.console()
    screen = Screen(console, Drawing())
    screen.open()
    screen.post("line [posted]")
    terminal.wait_for("line [posted]")
    screen.post("line last")
    screen.close()  # what was posted before is printed
    lines = terminal.finish()
    assert numbered(lines) == ["line [posted]", "line last"] and len(panels(lines)) == 1


def test_it_can_be_closed_without_having_been_opened_and_twice() -> None:
    terminal = Terminal()
    screen = Screen(terminal.console(), Drawing())
    screen.close()
    screen.open()
    screen.close()
    screen.close()
    assert not screen.is_on


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((40, 10), {}, True),
        ((39, 10), {}, False),
        ((40, 9), {}, False),
        ((80, 24), {"quiet": True}, False),
        ((80, 24), {"no_color": True}, False),
        ((80, 24), {"force_terminal": False}, False),
        ((80, 24), {"force_jupyter": True}, False),
    ],
)
def test_it_needs_a_terminal_with_room(size: tuple[int, int], options: dict[str, Any], expected: bool) -> None:
    assert can_draw(Terminal(*size).console(**options)) == expected


@pytest.mark.parametrize(
    "environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"TTY_COMPATIBLE": "0"}, {"TTY_INTERACTIVE": "0"}]
)
def test_environments_that_refuse_it(environment: dict[str, str]) -> None:
    file = Terminal().console().file
    assert can_draw(Console(file=file, width=80, height=24, _environ={"TERM": "xterm"}))
    assert not can_draw(Console(file=file, width=80, height=24, _environ={"TERM": "xterm"} | environment))


def test_a_file_is_no_terminal_even_if_colours_are_forced(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        assert not can_draw(Console(file=file, force_terminal=True, width=80, height=24))
        assert not can_draw(Console(file=file, width=80, height=24, _environ={"FORCE_COLOR": "1"}))
    assert not can_draw(Console(file=io.StringIO(), force_terminal=True, width=80, height=24))


def test_a_terminal_without_its_characters_has_none() -> None:
    terminal = Terminal()
    with os.fdopen(os.dup(terminal._theirs), "w", encoding="ascii") as file:
        assert not can_draw(Console(file=file, width=80, height=24, _environ={"TERM": "xterm"}))


def test_what_is_printed_elsewhere_arrives_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json > FILE` has its records in the file, and the panel on the terminal."""
    terminal, out, err = Terminal(), io.StringIO(), terminal_file()
    console = terminal.console()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    screen = Screen(console, Drawing())
    screen.open()
    print("for the file")
    print("line for the terminal", file=sys.stderr)
    screen.close()
    assert (sys.stdout, sys.stderr) == (out, err)
    assert out.getvalue() == "for the file\n"
    assert numbered(terminal.finish()) == ["line for the terminal"]


def terminal_file() -> Any:
    return Terminal().console().file
