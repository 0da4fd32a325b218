"""A terminal for tests: a pseudo terminal whose other end is read by an emulator."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pyte
from rich.console import Console

import dylora_moe

SOURCE = Path(dylora_moe.__file__).parents[1]
# The terminal becomes that of the process and Ctrl-C is not ignored, as a shell would have it.
_TAKE = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
_MAIN = "import torch; torch.set_num_threads(1)\nfrom dylora_moe.cli.main import main; main()\n"


class Terminal:
    """Shows what is written to it, and keeps what scrolled away."""

    def __init__(self, width: int = 100, height: int = 40) -> None:
        self.width, self.height = width, height
        self._screen = pyte.HistoryScreen(width, height, history=100_000)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self.written = b""
        self._files: list[IO[str]] = []
        self._ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def console(self, **options: Any) -> Console:
        """Of this process, on this terminal."""
        file = os.fdopen(os.dup(self._theirs), "w", encoding="utf-8")
        self._files.append(file)
        environment = {"TERM": "xterm-256color"}
        return Console(file=file, width=self.width, height=self.height, _environ=environment, **options)

    def start(self, *arguments: object, before: str = "", **environment: str) -> "subprocess.Popen[bytes]":
        """`dylora` with its three streams here, and some Python before it."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
        streams = {"stdin": self._theirs, "stdout": self._theirs, "stderr": self._theirs}
        return subprocess.Popen(
            [sys.executable, "-c", _TAKE + before + _MAIN, *map(str, arguments)],
            env=inherited | {"TERM": "xterm-256color", "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"} | environment,
            start_new_session=True,
            **streams,
        )

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Until it has been written, and has been shown."""
        end = time.monotonic() + timeout_s
        while text.encode() not in self.written:
            assert time.monotonic() < end, f"no {text!r} in {self.written[-3000:].decode(errors='replace')}"
            time.sleep(0.01)

    def wait_for_panel(self) -> None:
        """Until what was written last is the end of a panel, so that the next one is half a second away."""
        until(lambda: [line for line in self.lines() if line][-1].startswith("\u2570"))

    def lines(self) -> list[str]:
        """All that a person finds, what scrolled away first."""
        with self._lock:
            away = [self._text_of(row) for row in self._screen.history.top]
            return [line.rstrip() for line in (*away, *self._screen.display)]

    def finish(self) -> list[str]:
        """`lines` once all is read; processes must have ended."""
        for file in self._files:
            file.close()
        os.close(self._theirs)
        self._reader.join(timeout=30)
        assert not self._reader.is_alive()
        os.close(self._ours)
        return self.lines()

    @property
    def cursor_is_shown(self) -> bool:
        return not self._screen.cursor.hidden

    def _text_of(self, row: Any) -> str:
        return "".join(row[column].data for column in range(self.width))

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # the last one who could write has closed it
                return
            with self._lock:
                self._stream.feed(part)
                self.written += part


def panels(lines: list[str]) -> list[list[str]]:
    """The panels among lines, each with its frame."""
    found: list[list[str]] = []
    is_inside = False
    for line in lines:
        if line.startswith("\u256d"):
            is_inside = True
            found.append([])
        if is_inside:
            found[-1].append(line)
        is_inside = is_inside and not line.startswith("\u2570")
    return found


def without_panels(lines: list[str]) -> list[str]:
    """What else was printed; a panel goes with the empty line below it."""
    left: list[str] = []
    is_inside = skips = False
    for line in lines:
        if skips and not line:
            skips = False
            continue
        skips = False
        is_inside = is_inside or line.startswith("\u256d")
        if not is_inside:
            left.append(line)
        elif line.startswith("\u2570"):
            is_inside, skips = False, True
    return left


def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
