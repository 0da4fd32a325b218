"""SIGTERM and SIGINT: the run ends where nothing is lost, and its exit code says that it can go on."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: not finished, the same command goes on. Schedulers restart what does not exit with 0."""


def ignore_signals(worker: int = 0) -> None:
    """For processes that help this one: whoever signals the whole group means the run, which ends them itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Stopped(BaseException):
    """A signal asked the run to end. No `Exception`, so that no library takes it for an error of its own."""


def announce(line: str) -> None:
    """Write a line to standard error, in a signal handler: not by print, in whose middle the signal may have come."""
    os.write(2, f"\n{line}\n".encode())


class StopSignals:
    """Inside the block SIGTERM and SIGINT raise `Stopped`: at once, or in a `deferred` block where `check` is called.

    A second SIGINT ends the process as the system does it. Only the main thread can have such a block.

    Args:
        deferring: What a person is told who signals where it only counts later.

    Attributes:
        announce: Tells it, in a signal handler.
        most: The largest of the numbers that the processes of a run give; what was given, where there is one process.
    """

    def __init__(self, deferring: str = "stopping after a checkpoint. Ctrl-C ends at once, without.") -> None:
        self._deferring = deferring
        self.announce: Callable[[str], None] = announce
        self.most: Callable[[int], int] = lambda number: number
        self._deferred = False
        self._came: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a signal only counts where `check` is called."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def came(self) -> str | None:
        """Name of the signal that came; None while there is none."""
        return self._came

    def check(self) -> None:
        """End here if a signal came, to this process or to another one of the run; all of them ask together.

        Raises:
            Stopped: It did.
        """
        came = self.most(signal.Signals[self._came] if self._came is not None else 0)
        if came:
            self._came = self._came or signal.Signals(came).name
            raise Stopped(self._came)

    def _take(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._came is not None:
            return
        self._came = signal.Signals(number).name
        if not self._deferred:
            raise Stopped(self._came)
        self.announce(f"{self._came}: {self._deferring}")
