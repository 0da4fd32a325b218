"""A command that runs a program inside -> its outcome: watched while it runs, and everything of it ended afterwards."""

import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dylora_moe.errors import SandboxError
from dylora_moe.sandbox import stage, tree
from dylora_moe.sandbox.limits import Ending, Limits, Outcome

_LOOK_EVERY = 0.1
# A look reads a file for every process of the machine: at most this share of one processor.
_MOST_OF_A_PROCESSOR = 0.05
_MOST_FILES = 10_000
_LONGEST_PATH = 2_000
_BLOCK = 512
_CHUNK = 1 << 16
# bwrap and the stage, or sandlock's process and the stage.
_OWN_PROCESSES = 2
_GRACE_SECONDS = 5.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a back end runs the stage."""

    command: Sequence[str]
    folder: Path | None = None
    """Where the program writes, where that lies on the host: it is entered, and its size is looked at."""
    pass_fds: Sequence[int] = ()
    report: int | None = None
    """A file descriptor from which the processor seconds of the program can be read at the end, as text."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of `command`; the program's is empty in any case."""
    stop: Sequence[str] = ()
    """A command that ends the program, where it does not run below `command`: its processor seconds are unknown."""


def stage_arguments(limits: Limits, *, bind_processes: bool, user: int = 0, rules: bytes = b"") -> list[str]:
    """What follows the Python that runs the stage.

    Args:
        limits: Of the program.
        bind_processes: Whether the kernel's limit of processes counts those of the program alone.
        user: To become; 0 for none.
        rules: A seccomp filter to set, or none.
    """
    numbers = (
        math.ceil(limits.cpu_seconds),
        limits.memory_bytes,
        limits.processes + 1 if bind_processes else 0,  # the stage is one
        limits.file_bytes,
        user,
    )
    return ["-I", "-S", "-c", Path(stage.__file__).read_text(encoding="utf-8"), *map(str, numbers), rules.hex()]


def run_watched(launch: Launch, program: str, limits: Limits) -> Outcome:
    """Runs a program to its end or to a limit.

    Raises:
        SandboxError: The program was never started; with what the back end said.
    """
    started = time.monotonic()
    with _started(launch) as process:
        run = _Run(process, launch, limits, started)
        ending = run.follow(program.encode())
        status, cpu = run.end()
        wall = time.monotonic() - started
    said, mark, errors = bytes(run.errors.content).partition(stage.STARTED)
    if not mark:
        cause = _text(said).strip().rpartition("\n")[2] or f"it ended with status {status}"
        raise SandboxError(
            f"The sandbox must start the program, and it did not: {cause.rstrip('.')}. "
            "`dylora doctor sandbox` shows which sandboxes work here."
        )
    stdout, stderr = _text(bytes(run.output.content)), _text(errors[: limits.output_bytes])
    ended = ending or _ending(status, cpu, stderr, limits)
    return Outcome(
        ended=ended,
        exit_code=status if ended in ("passed", "failed") else None,
        stdout=stdout,
        stderr=stderr,
        cpu_seconds=cpu,
        wall_seconds=wall,
    )


@contextmanager
def _started(launch: Launch) -> Iterator["subprocess.Popen[bytes]"]:
    """The command in a session of its own, with nothing of our environment."""
    process = subprocess.Popen(
        launch.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=launch.environment,
        cwd=launch.folder or "/",
        pass_fds=launch.pass_fds,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:  # interrupted
            _end_all(process, launch)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


class _Captured:
    """The beginning of a stream."""

    def __init__(self, pipe: IO[bytes] | None, most: int) -> None:
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        self.pipe, self.content, self._most = pipe, bytearray(), most
        self.is_over = False

    def read(self) -> bool:
        """Takes what is there; False at the end of the stream."""
        try:
            part = os.read(self.pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return True
        room = self._most - len(self.content)
        self.content += part[:room]
        self.is_over |= len(part) > room
        return bool(part)


class _Run:
    """A command that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", launch: Launch, limits: Limits, started: float) -> None:
        self._process, self._launch, self._limits = process, launch, limits
        self._last = started + limits.wall_seconds
        self.output = _Captured(process.stdout, limits.output_bytes)
        self.errors = _Captured(process.stderr, limits.output_bytes + len(stage.STARTED))
        self._usage: Any = None

    def follow(self, program: bytes) -> Ending | None:
        """Hands over the program, takes its output, looks at what it uses; the limit that it passed, if any."""
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        rest = memoryview(program)
        look = time.monotonic() + _LOOK_EVERY
        with selectors.DefaultSelector() as events, _exit_event(self._process.pid) as gone:
            events.register(self._process.stdin, selectors.EVENT_WRITE)
            for stream in (self.output, self.errors):
                events.register(stream.pipe, selectors.EVENT_READ, stream)
            if gone is not None:
                events.register(gone, selectors.EVENT_READ)
            while not self._has_ended():
                now = time.monotonic()
                if now >= self._last:
                    return "wall time"
                if now >= look:
                    if passed := self._look():
                        return passed
                    look = time.monotonic() + max(_LOOK_EVERY, (time.monotonic() - now) / _MOST_OF_A_PROCESSOR)
                wait = min(look, self._last) - now if gone is not None else 0.02
                for key, _ in events.select(max(wait, 0.0)):
                    if key.fileobj is self._process.stdin:
                        rest = self._hand_over(rest)
                        if not rest:
                            events.unregister(key.fileobj)
                            self._process.stdin.close()
                    elif isinstance(key.data, _Captured) and not key.data.read():
                        events.unregister(key.fileobj)
                if self.output.is_over or self.errors.is_over:
                    return "output"
        return None

    def end(self) -> tuple[int, float | None]:
        """Ends all that is left; the command's exit code, 128 and more for a signal, and processor seconds."""
        if self._usage is None:
            self._usage = _end_all(self._process, self._launch)
        for stream in (self.output, self.errors):
            while not stream.is_over and _has_more(stream.pipe) and stream.read():
                pass
        code, cpu = self._usage
        if self._launch.report is not None:
            os.set_blocking(self._launch.report, False)
            with suppress(BlockingIOError):  # nothing was written
                cpu = float(os.read(self._launch.report, 100))
        return code, None if self._launch.stop else cpu

    def _has_ended(self) -> bool:
        self._usage = _reap(self._process, os.WNOHANG)
        return self._usage is not None

    def _hand_over(self, rest: memoryview) -> memoryview:
        assert self._process.stdin is not None
        try:
            return rest[os.write(self._process.stdin.fileno(), rest[:_CHUNK]) :]
        except BlockingIOError:
            return rest
        except BrokenPipeError:
            return rest[:0]

    def _look(self) -> Ending | None:
        below = tree.below(self._process.pid)
        alive = [process for process in below if not process.is_dead]
        if sum(process.cpu_seconds for process in below) > self._limits.cpu_seconds:
            return "cpu time"
        if sum(process.memory_bytes for process in alive) > self._limits.memory_bytes:
            return "memory"
        if len(alive) > self._limits.processes + _OWN_PROCESSES:
            return "processes"
        if self._launch.folder is not None:
            room = self._limits.file_bytes - _deleted_bytes(self._launch.folder, alive)
            if room < 0 or _is_larger(self._launch.folder, room):
                return "disk"
        return None


def _ending(status: int, cpu: float | None, stderr: str, limits: Limits) -> Ending:
    """What a program came to that no look ended."""
    if (cpu is not None and cpu >= limits.cpu_seconds) or status == 128 + signal.SIGXCPU:
        return "cpu time"
    if status == 0:
        return "passed"
    if status > 128:
        return "killed"
    return "memory" if stderr.rstrip().rpartition("\n")[2].startswith("MemoryError") else "failed"


def _end_all(process: "subprocess.Popen[bytes]", launch: Launch) -> tuple[int, float]:
    """Kills what runs below a command, as often as something does, then the command, if it did not end by itself.

    The command is last: while it is there, nothing below it gets another parent.
    """
    if launch.stop:
        subprocess.run(
            launch.stop,
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_STOP_SECONDS,
            check=False,
        )
    last = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < last:
        for each in tree.below(process.pid):
            if not each.is_dead:
                _kill(each.pid)
        if usage := _reap(process, os.WNOHANG):
            return usage
        time.sleep(0.01)
    _kill(process.pid)
    usage = _reap(process, 0)
    assert usage is not None
    return usage


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    """What stayed in the session of a command."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _reap(process: "subprocess.Popen[bytes]", options: int) -> tuple[int, float] | None:
    """Exit code and processor seconds of a command and all that it waited for; None while it runs."""
    if hasattr(os, "waitid"):
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | options) is None:
            return None
        _kill_group(process.pid)  # while the number is still its own
    pid, status, usage = os.wait4(process.pid, options)
    if not pid:
        return None
    code = process.returncode = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code, usage.ru_utime + usage.ru_stime


@contextmanager
def _exit_event(pid: int) -> Iterator[int | None]:
    """A file descriptor that can be read once a process has ended, on Linux."""
    try:
        event = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or an old one
        yield None
        return
    try:
        yield event
    finally:
        os.close(event)


def _has_more(pipe: IO[bytes]) -> bool:
    with selectors.DefaultSelector() as events:
        events.register(pipe, selectors.EVENT_READ)
        return bool(events.select(0))


def _is_larger(folder: Path, most: int) -> bool:
    """Whether files of a folder take more room than that, are very many, or are hidden from who counts them."""
    total = count = 0
    hidden: list[OSError] = []
    for where, folders, names in os.walk(folder, onerror=hidden.append):
        for name in names:
            with suppress(FileNotFoundError):  # they may come and go meanwhile
                total += os.lstat(os.path.join(where, name)).st_blocks * _BLOCK
        count += len(names) + len(folders)
        if total > most or count > _MOST_FILES or len(where) > _LONGEST_PATH:
            return True
    return any(not isinstance(error, FileNotFoundError) for error in hidden)


def _deleted_bytes(folder: Path, processes: Sequence[tree.Process]) -> int:
    """Room that files take which have no name any more, but are open."""
    device = folder.stat().st_dev
    found: dict[int, int] = {}
    for process in processes:
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{process.pid}/fd"):
                with suppress(OSError):
                    status = entry.stat()
                    if status.st_dev == device and not status.st_nlink:
                        found[status.st_ino] = status.st_blocks * _BLOCK
    return sum(found.values())


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")
