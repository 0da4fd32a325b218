"""`dylora chat RUN` as a person meets it: on a pseudo terminal, and with lines from a pipe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.cli.conftest import finish, start_python
from tests.train.terminal import Terminal, until

from dylora_moe.cli.chat_show import Show
from dylora_moe.cli.main import main
from dylora_moe.cli.show import printable
from dylora_moe.evaluate.load import Speaker
from dylora_moe.serve.request import Piece
from dylora_moe.serve.talk import Answer

Run = Callable[..., Any]
QUESTION = "Say blue river in capitals."
# Answers long enough to be stopped.
SLOW = """
import time
from dylora_moe.serve.rows import Rows
step = Rows.step
Rows.step = lambda self, ids: (time.sleep(0.2), step(self, ids))[1]
"""


def talk(finished: Any, typed: str, *arguments: object, **environment: str) -> tuple[str, str]:
    """(standard output, standard error) of a conversation by pipes."""
    code = "from dylora_moe.cli.main import main; main()"
    process = start_python(code, "chat", finished.folder, *arguments)
    assert process.stdin is not None
    process.stdin.write(typed)
    return finish(process)


def answer(dylora: Run, finished: Any, *arguments: object, tokens: int = 6) -> Any:
    return dylora(
        "chat", finished.folder, "--prompt", QUESTION, "--max-new-tokens", tokens, "--json", *arguments
    ).json()


def test_a_pipe_gets_the_answers_and_nothing_else(dylora: Run, finished: Any, tmp_path: Path) -> None:
    typed = f"{QUESTION}\n\n/base\n/clear\n{QUESTION}\n/nonsense\n/save {tmp_path / 'kept.jsonl'}\n"
    out, err = talk(finished, typed, "--max-new-tokens", 6)
    routed, base = answer(dylora, finished)["text"], answer(dylora, finished, "--base")["text"]
    assert out == printable(f"{routed}\n{base}\n")
    assert "you>" not in err and "base answers from now on" in err and "got /nonsense" in err
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["messages"][1]["content"] for line in lines] == [routed, base]


def test_marks_stand_for_colours_where_there_are_none(dylora: Run, finished: Any) -> None:
    out, err = talk(finished, f"/route\n{QUESTION}\n/base\n{QUESTION}", "--max-new-tokens", 6)
    found = answer(dylora, finished)
    best = max(found["routing"], key=found["routing"].get)
    assert out.splitlines()[0].startswith(f"[={best}]") and "\x1b" not in out
    assert "[=base]" in out and f"tokens by {best} " in err and "tokens by base 100%" in err


def test_a_conversation_on_a_terminal(dylora: Run, finished: Any, tmp_path: Path) -> None:
    terminal = Terminal(width=120, height=50)
    process = terminal.start("chat", finished.folder, "--max-new-tokens", 6)
    for typed, shown in (
        (b"/route\n", "tokens by"),
        (QUESTION.encode() + b"\n", "100%"),
        (b"/compare expert_2\n", "expert_2"),
        (b"/exp\tx\n", "got 'x'"),
        (b"/system Be brief.\n", "message is set"),
        (b"/help\n", "Ctrl-C stops"),
    ):
        terminal.wait_for("you> ")
        before = len(terminal.written)
        terminal.type(typed)
        _wait_after(terminal, before, shown)
        _wait_after(terminal, terminal.written.rindex(shown.encode(), before), "you> ")
    _assert_tinted(terminal, answer(dylora, finished))
    terminal.type(b"\x04")
    assert process.wait(timeout=60) == 0
    whole = "\n".join(terminal.finish())
    head = next(line for line in whole.splitlines() if "base" in line and "mixture" in line and "expert_2" in line)
    assert head.index("base") < head.index("mixture") < head.index("expert_2")  # side by side
    assert "Traceback" not in whole


def _wait_after(terminal: Terminal, place: int, text: str) -> None:
    """Until it is written behind that place."""
    until(lambda: text.encode() in terminal.written[place:], timeout_s=60)


def _assert_tinted(terminal: Terminal, found: Any) -> None:
    """The answer's cells have the ground that the legend gives the expert who spoke."""
    best = max(found["routing"], key=found["routing"].get)
    screen = terminal._screen.buffer
    rows = {y: "".join(screen[y][x].data for x in range(terminal.width)) for y in range(terminal.height)}
    legend = next(y for y, text in rows.items() if text.startswith("tokens by"))
    ground = screen[legend][rows[legend].index(best)].bg
    row = next(y for y, text in rows.items() if text.startswith("mixture> "))
    text = found["text"].splitlines()[0].rstrip() if found["text"].strip() else ""
    assert ground != "default" and text
    cells = [screen[row][x] for x in range(len("mixture> "), len("mixture> ") + len(text))]
    assert {cell.bg for cell in cells} == {ground}


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(finished: Any, tmp_path: Path) -> None:
    terminal = Terminal()
    process = terminal.start("chat", finished.folder, "--base", "--max-new-tokens", 150, before=SLOW)
    terminal.wait_for("you> ")
    terminal.type(QUESTION.encode() + b"\n")
    terminal.wait_for("base> ")
    before = len(terminal.written)
    _wait_more(terminal, before + 5)
    terminal.type(b"\x03")
    terminal.wait_for("stopped")
    terminal.type(f"/save {tmp_path / 'kept.jsonl'}\n".encode())
    terminal.wait_for("1 conversation written")
    kept = json.loads((tmp_path / "kept.jsonl").read_text(encoding="utf-8"))
    assert kept["answered"][0]["finish"] == "cancelled" and kept["messages"][1]["content"]
    terminal.type(b"\x03")  # at the prompt it ends nothing
    terminal.wait_for("Ctrl-D leaves")
    terminal.type(b"/quit\n")
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in "\n".join(terminal.finish())


def test_an_answer_that_was_stopped_before_its_first_token_is_nobodys(finished: Any, tmp_path: Path) -> None:
    held = f"""
import time
from pathlib import Path
from dylora_moe.serve.rows import Rows
read = Rows.prefilled
def hold(*arguments):
    Path({str(tmp_path / "reading")!r}).touch()
    while not Path({str(tmp_path / "go")!r}).exists():
        time.sleep(0.01)
    return read(*arguments)
Rows.prefilled = hold
"""
    terminal = Terminal()
    process = terminal.start("chat", finished.folder, before=held)
    terminal.wait_for("you> ")
    terminal.type(b"/route\n")
    terminal.wait_for("base, without colour")
    terminal.type(QUESTION.encode() + b"\n")
    until(lambda: (tmp_path / "reading").exists(), timeout_s=60)
    before = len(terminal.written)
    terminal.type(b"\x03")
    _wait_after(terminal, before, "stopped")
    assert b"tokens by" not in terminal.written[before:]
    (tmp_path / "go").touch()
    terminal.type(b"/quit\n")
    assert process.wait(timeout=60) == 0
    terminal.finish()


def _wait_more(terminal: Terminal, length: int) -> None:
    until(lambda: len(terminal.written) >= length, timeout_s=60)


def test_what_a_model_writes_steers_no_terminal() -> None:
    terminal = Terminal(width=80, height=10)
    console = terminal.console(emoji=False)
    show = Show(console, console, ["a\x1b[2Jb"])
    hostile = "kept \x1b[2J\x1b]0;title\x07\x9b31m [red]x[/red] \r:smile:"
    piece = Piece(text=hostile, token_id=5, experts={"a\x1b[2Jb": 1.0}, finish="stop")
    answers = [Answer(speaker=Speaker(kind="expert", expert="a\x1b[2Jb"), pieces=[piece], finish="stop")]
    for routes in (False, True):
        show.routes = routes
        show.begin("a\x1b[2Jb")
        show.piece(piece)
        show.end()
        show.legend()
        show.beside(answers)
    written = "\n".join(terminal.finish())
    assert written.count("kept \\x1b[2J\\x1b]0;title\\x07\\x9b31m [red]x[/red] \\x0d:smile:") >= 2
    assert b"\x1b[2J" not in terminal.written and b"\x1b]" not in terminal.written and b"\x9b" not in terminal.written


@pytest.mark.parametrize(("width", "columns"), [(120, True), (60, False)])
def test_answers_stand_side_by_side_where_there_is_room(width: int, columns: bool) -> None:
    terminal = Terminal(width=width, height=30)
    console: Console = terminal.console(emoji=False)
    show = Show(console, console, ["sums"])
    speakers = [Speaker(kind="base"), Speaker(), Speaker(kind="expert", expert="sums")]
    pieces = [Piece(text=f"words {number} " * 4, token_id=1, finish="stop") for number in range(3)]
    show.beside([Answer(speaker=s, pieces=[p], finish="stop") for s, p in zip(speakers, pieces, strict=True)])
    lines = terminal.finish()
    together = [line for line in lines if "words 0" in line and "words 1" in line and "words 2" in line]
    assert bool(together) == columns
    assert all(f"words {number}" in "\n".join(lines) for number in range(3))


def test_json_needs_a_question(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["chat", str(finished.folder), "--json"])
    assert exit.value.code == 2 and "--json needs --prompt" in capsys.readouterr().err
