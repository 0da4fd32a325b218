"""The live view of real runs on a pseudo terminal: `dylora train` as a person starts it, and stops it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.terminal import Terminal, panels, without_panels

from dylora_moe.config import RunConfig
from dylora_moe.errors import RunError
from dylora_moe.run_dir import RunDir
from dylora_moe.train.callbacks import live
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages
from dylora_moe.train.stopping import EXIT_CODE, StopSignals
from dylora_moe.train.trainer import RoutedTrainer

SHORT = {"max_steps": 6, "logging_steps": 1, "eval_steps": 3, "sample_tokens": 0}
LONG = {"max_steps": 100_000, "num_epochs": 100_000, "logging_steps": 1, "sample_tokens": 0}
# Steps long enough for a signal to come in the middle of one.
SLOW = (
    "import time\n"
    "from dylora_moe.train.trainer import RoutedTrainer\n"
    "compute = RoutedTrainer.compute_loss\n"
    "RoutedTrainer.compute_loss = lambda *args, **kwargs: (time.sleep({seconds}), compute(*args, **kwargs))[1]\n"
)


@pytest.fixture
def recipe(tiny_settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """(**changes) -> a recipe file."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(tiny_settings(**changes), default=str))
        return path

    return write


def plain(text: str) -> list[str]:
    """Lines without what clocks and memory say."""
    return [line.rstrip() for line in re.sub(r"\d+ (?=tokens/s|MB)", "N ", text).splitlines()]


def test_on_a_terminal_a_panel_and_in_a_file_the_same_lines_without(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path, terminal = recipe(**SHORT), Terminal(240, 30)
    process = terminal.start("train", path, "--output_dir", tmp_path / "there")
    assert process.wait(timeout=120) == 0
    lines = terminal.finish()
    (panel,) = panels(lines)
    assert panel[0].startswith("\u256d\u2500 tiny \u2500") and "100%  step 6 of 6" in panel[1]
    for row in ("training loss", "validation loss", "capitals", "functions", "sums"):
        assert re.search(rf"{row} +[\u2581-\u2588]+ +\d+\.\d{{3}} +[+-]\d+%", "\n".join(panel)), row
    assert sum(bool(re.search(r"expert_\d .* \d+%", line)) for line in panel) == 3
    assert terminal.cursor_is_shown
    # The same run into a file.
    with (tmp_path / "log").open("wb") as log:
        code = "import torch; torch.set_num_threads(1); from dylora_moe.cli.main import main; main()"
        command = [sys.executable, "-c", code, "train", str(path), "--output_dir", str(tmp_path / "file_")]
        environment = {**os.environ, "COLUMNS": "240", "FORCE_COLOR": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=120, check=True)
    text = (tmp_path / "log").read_text()
    assert "\x1b" not in text and text.count("validation loss:") == 3
    found = plain(
        "\n".join(without_panels(lines)).rstrip("\n").replace(str(tmp_path / "there"), str(tmp_path / "file_"))
    )
    assert found == plain(text)


def test_a_dumb_terminal_has_the_lines_alone(recipe: Callable[..., Path]) -> None:
    terminal = Terminal()
    assert terminal.start("train", recipe(**SHORT), TERM="dumb").wait(timeout=120) == 0
    lines = terminal.finish()
    assert panels(lines) == [] and "Training for 6 steps." in lines
    assert sum(line.startswith("step     0  validation loss:") for line in lines) == 1
    assert b"\x1b" not in terminal.written


@pytest.mark.parametrize(("width", "options"), [(39, {}), (100, {"no_color": True})])
def test_nor_has_a_narrow_one_or_one_without_colours_a_panel(
    tiny_config: Callable[..., RunConfig], width: int, options: dict[str, Any]
) -> None:
    terminal = Terminal(width)
    train(tiny_config(**SHORT), Stages(console=terminal.console(**options)))
    lines = terminal.finish()
    assert "Training for 6 steps." in lines and panels(lines) == [] and b"\x1b[2K" not in terminal.written


def interrupt(terminal: Terminal, process: "subprocess.Popen[bytes]") -> None:
    terminal.type(b"\x03")


def terminate(terminal: Terminal, process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(("act", "name"), [(interrupt, "SIGINT"), (terminate, "SIGTERM")])
def test_a_signal_leaves_lines_and_panel_and_terminal_in_order(
    recipe: Callable[..., Path], act: Callable[..., None], name: str
) -> None:
    terminal = Terminal(100, 24)
    process = terminal.start("train", recipe(**LONG), before=SLOW.format(seconds=1.5))
    terminal.wait_for("step     1/100000")
    act(terminal, process)
    terminal.wait_for(f"{name}: stopping after a checkpoint")  # while the step goes on
    assert process.poll() is None
    assert process.wait(timeout=60) == EXIT_CODE
    lines = terminal.finish()
    said, stopped = (
        next(i for i, line in enumerate(lines) if line.startswith(f"{name}: {what}"))
        for what in ("stopping", "stopped")
    )
    (panel,) = panels(lines)
    top = lines.index(panel[0])
    assert said < top < top + len(panel) <= stopped
    assert "Ctrl-C ends at once" in lines[said] and "The same command goes on." in lines[stopped]
    assert any(line.startswith("step     1/100000") for line in lines)
    assert terminal.cursor_is_shown


def test_ctrl_c_twice_and_a_kill_leave_the_cursor_where_it_can_be_seen(recipe: Callable[..., Path]) -> None:
    path = recipe(**LONG)
    for keys, number in ((b"\x03", signal.SIGINT), (b"", signal.SIGKILL)):
        terminal = Terminal(100, 24)
        process = terminal.start("train", path, before=SLOW.format(seconds=2))
        terminal.wait_for("elapsed ")
        terminal.wait_for_panel()
        if keys:
            terminal.type(keys)
            terminal.wait_for("stopping after a checkpoint")
            terminal.wait_for_panel()
            terminal.type(keys)
        else:
            process.kill()
        assert process.wait(timeout=60) == -number
        lines = terminal.finish()
        assert terminal.cursor_is_shown and len(panels(lines)) == 1, (number, lines)
        assert not lines[-1] or len(lines) > terminal.height  # it is on a line of its own


def test_curves_begin_with_what_the_run_had_before_it_was_stopped(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(**SHORT | {"max_steps": 12, "save_steps": 2})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        stop_in_step(patch, 9)
        train(config)
    logged = [line for line in RunDir(config.run_dir).read_lines("metrics.jsonl") if "loss" in line]
    assert len(logged) == 8
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        stop_in_step(patch, 1)  # before it logs anything
        train(config, Stages(console=terminal.console()))
    (panel,) = panels(terminal.finish())
    (row,) = [line for line in panel if "training loss" in line]
    assert len(re.findall("[\u2581-\u2588]", row)) == len(logged)
    change = logged[-1]["loss"] / logged[0]["loss"] - 1
    assert f"{logged[-1]['loss']:.3f}" in row and f"{change:+.0%}" in row
    assert "step  8 of 12" in panel[1]


def stop_in_step(patch: pytest.MonkeyPatch, call: int) -> None:
    compute, calls = RoutedTrainer.compute_loss, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("stopped")
        return compute(*args, **kwargs)

    patch.setattr(RoutedTrainer, "compute_loss", failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, RunError])
def test_after_an_error_nothing_is_left_behind(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(RoutedTrainer, "compute_loss", fail)
    terminal, stop = Terminal(), StopSignals()
    before, streams = stop.announce, (sys.stdout, sys.stderr)
    with pytest.raises(error):
        train(tiny_config(**SHORT), Stages(console=terminal.console()), stop)
    assert stop.announce == before and (sys.stdout, sys.stderr) == streams
    assert len(panels(terminal.finish())) == 1 and terminal.cursor_is_shown


@pytest.mark.parametrize("where", ["draw", "History"])
def test_a_view_that_fails_costs_the_run_nothing(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = train(tiny_config(**SHORT, run_name="whole"))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(*((live, "draw", fail) if where == "draw" else (live.History, "add", fail)))
    terminal = Terminal()
    result = train(tiny_config(**SHORT, run_name="failing"), Stages(console=terminal.console()))
    assert {**result, "run": ""} == {**whole, "run": ""}
    lines = terminal.finish()
    told = [line for line in lines if "The live view failed and is off" in line]
    assert told == ["The live view failed and is off: ZeroDivisionError('here'). Training goes on."]
    assert panels(lines) == [] and sum(line.startswith("step ") for line in lines) == 6 + 3
    assert terminal.cursor_is_shown


def test_warnings_are_in_the_panel_and_above_it(tiny_config: Callable[..., RunConfig]) -> None:
    """Of a run that learns nothing."""
    terminal = Terminal(140, 40)
    config = tiny_config(max_steps=60, num_epochs=100, logging_steps=1, sample_tokens=0, learning_rate=1e-9)
    train(config, Stages(console=terminal.console()))
    lines = terminal.finish()
    signs = RunDir(config.run_dir).read_lines("warnings.jsonl")
    assert signs
    (panel,) = panels(lines)
    newest = f"Warning at step {signs[-1]['step']}: {signs[-1]['seen']}"[:100]
    assert any(newest in line for line in panel)
    assert any(line.startswith(newest) for line in without_panels(lines))


def test_a_stream_has_a_panel_a_skill_that_says_where_it_is(stream: Callable[..., RunConfig]) -> None:
    terminal = Terminal(120, 40)
    config = stream(logging_steps=1)
    train(config, Stages(console=terminal.console()))
    found = panels(terminal.finish())
    titles = [re.findall(r"skill \d of \d: \w+", panel[0]) for panel in found]
    assert titles == [["skill 1 of 3: capitals"], ["skill 2 of 3: functions"], ["skill 3 of 3: sums"]]
    assert all(panel[0].startswith(f"\u256d\u2500 {config.run_name} ") for panel in found)
    assert any("decided  capitals grow, functions grow, sums grow " in line for line in found[2])
