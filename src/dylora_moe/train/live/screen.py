"""Keeps a panel at the bottom of a terminal while lines scroll above it; what fails here is told, and never raised."""

import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment

# Seconds between two pictures: those of a clock look even, and drawing one takes milliseconds.
_INTERVAL_S = 0.5
_MIN_WIDTH, _MIN_HEIGHT = 40, 10
# Columns left free: a terminal writes ^C where the cursor is, and a row that wraps for it is one too few to take away.
_ECHO = 2


def can_draw(console: Console) -> bool:
    """True on a terminal where a panel can stay and has room, whose user does not refuse colours.

    Colours can be forced on a file, too, which is no terminal for that.
    """
    if console.quiet or console.no_color or console.legacy_windows or not console.is_interactive:
        return False
    has_room = console.width >= _MIN_WIDTH and console.height >= _MIN_HEIGHT
    return _is_terminal(console.file) and has_room and console.encoding.startswith("utf")


def _is_terminal(file: Any) -> bool:
    return bool(getattr(file, "isatty", lambda: False)())


class Screen:
    """A panel that a thread of its own draws.

    The cursor stays visible, on the line below: a process that is killed leaves the terminal as it should be.

    Args:
        console: Of a terminal; what is printed to it scrolls above the panel.
        draw: (width, height) of the room for it -> the panel as it is now. Called in the thread.
    """

    def __init__(self, console: Console, draw: Callable[[int, int], RenderableType]) -> None:
        self._console, self._draw = console, draw
        self._picture = _Picture()
        # What signal handlers want printed: it can be put in while the same queue is read. None ends the thread.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._live: Live | None = None
        self._thread: threading.Thread | None = None
        self._told = False

    @property
    def is_on(self) -> bool:
        """False before it is opened, once it is closed, and once it failed."""
        return self._live is not None

    def open(self) -> None:
        """Draw from now on."""
        self._live = Live(
            self._picture,
            console=self._console,
            auto_refresh=False,
            # What is sent to another place than a terminal is to arrive there.
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(sys.stderr),
        )
        try:
            self._live.start()
            self._console.show_cursor(True)
            self._refresh()
        except (Exception, SystemExit) as error:
            self.fail(error)
            return
        self._thread = threading.Thread(target=self._work, name="live-view", daemon=True)
        self._thread.start()

    def post(self, line: str) -> None:
        """Print a line soon; can be called in a signal handler."""
        self._lines.put(line)

    def close(self) -> None:
        """Draw a last time, and leave the picture where it is."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._lines.put(None)
            thread.join()
        try:
            self._refresh()
        except (Exception, SystemExit) as error:
            self.fail(error)
        self._stop()

    def fail(self, error: BaseException) -> None:
        """Be off for good, without a picture, and tell why."""
        self._picture.lines = []
        self._stop()
        if not self._told:
            self._told = True
            with suppress(Exception, SystemExit):
                text = f"The live view failed and is off: {error!r}. Training goes on."
                self._console.print(text, highlight=False, markup=False)

    def _work(self) -> None:
        while self.is_on:
            try:
                with suppress(queue.Empty):
                    line = self._lines.get(timeout=_INTERVAL_S)
                    if line is None:
                        return
                    self._console.print(line, highlight=False, markup=False)
                self._refresh()
            except (Exception, SystemExit) as error:  # rich exits where a pipe was closed
                self.fail(error)

    def _refresh(self) -> None:
        live = self._live
        if live is not None:
            options = self._console.options
            options = options.update_width(options.size.width - _ECHO)
            drawn = self._draw(options.max_width, options.size.height)
            self._picture.lines = self._console.render_lines(drawn, options, pad=False)
            live.refresh()

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with suppress(Exception, SystemExit):
                live.stop()


class _Picture:
    """What was drawn last, so that lines that are printed in between cost no drawing."""

    def __init__(self) -> None:
        self.lines: list[list[Segment]] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()
