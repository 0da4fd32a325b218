"""One tracker's process as training sees it: nothing here waits for it or raises, until `finish`, which has a limit."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dylora_moe.train.trackers.messages import Artifact, Finish, Message, Start, decode_answer, encode

# Seconds to let an ended tracker's process go away by itself.
_GRACE_S = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds that a tracker has for each thing before it is given up; only the last two are ever waited for.

    Attributes:
        start: To import its library and begin the run. W&B gives up by itself after 90.
        log: To take figures or samples.
        finish: From the end of training to the end of the tracker, all that is still waiting included.
        finish_with_artifact: The same where a folder is to be uploaded.
    """

    start: float = 120
    log: float = 60
    finish: float = 60
    finish_with_artifact: float = 600


def child_command(name: str) -> list[str]:
    """The command of the process of a tracker."""
    return [sys.executable, "-m", "dylora_moe.train.trackers.child", name]


class Channel:
    """Messages go into a queue, from which a thread gives them to the process, one at a time.

    Args:
        name: Of the tracker.
        command: Starts its process.
        log: File for what its process prints.
        advice: What to do when it fails.
        tell: Takes one line for a person, in the thread of this channel.
        limits: Of its patience.
    """

    def __init__(
        self,
        name: str,
        *,
        command: Sequence[str],
        log: Path,
        advice: str,
        tell: Callable[[str], None],
        limits: Limits,
    ) -> None:
        self.name = name
        self._command, self._log, self._advice, self._tell, self._limits = list(command), log, advice, tell, limits
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._off, self._expired, self._has_artifact = threading.Event(), "", False
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)

    @property
    def is_on(self) -> bool:
        """False once the tracker failed."""
        return not self._off.is_set()

    def send(self, message: Message) -> None:
        """Give a message to the tracker some time; nothing once it is off."""
        if not self.is_on:
            return
        if isinstance(message, Start):
            self._thread.start()
        self._has_artifact |= isinstance(message, Artifact)
        self._queue.put(message)

    def finish(self, *, ok: bool, seconds: float | None = None) -> None:
        """End the tracker, whatever it does; the only call that waits."""
        if not self._thread.is_alive():
            return
        usual = self._limits.finish_with_artifact if self._has_artifact else self._limits.finish
        limit = usual if seconds is None else seconds
        self._queue.put(Finish(ok=ok))
        self._thread.join(limit)
        if self._thread.is_alive():
            self._expire(limit)
            self._thread.join(_GRACE_S)

    def _work(self) -> None:
        """The thread: until the end of the run or of the tracker."""
        try:
            self._process = self._begin()
            while True:
                message = self._queue.get()
                self._exchange(self._process, message)
                if isinstance(message, Finish):
                    break
        except Exception as error:
            self._off.set()
            reason = self._expired or " ".join(str(error).split()) or type(error).__name__
            self._tell(
                f"{self.name} is off from here on: {reason.rstrip('.')}. Training goes on, and metrics.jsonl has all "
                f"figures. {self._advice}"
            )
        finally:
            self._end()

    def _begin(self) -> subprocess.Popen[bytes]:
        # The packages that this process finds, and none from the folder it happens to be in.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # No figures about the use of the libraries themselves.
        quiet = {"PYTHONSAFEPATH": "1", "OTEL_SDK_DISABLED": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
        with self._open_log() as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment | quiet,
                start_new_session=True,  # Ctrl-C is for training, which then ends its trackers in order
            )

    def _open_log(self) -> IO[bytes]:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            return self._log.open("ab")
        except OSError:
            return open(os.devnull, "ab")

    def _exchange(self, process: subprocess.Popen[bytes], message: Message) -> None:
        """Give one message and take its answer; a tracker that takes too long is killed, which ends the waiting."""
        assert process.stdin is not None and process.stdout is not None
        limit = self._limits.start if isinstance(message, Start) else self._limits.log
        timer = None
        if not isinstance(message, Finish | Artifact):  # for these `finish` has the time
            timer = threading.Timer(limit, self._expire, (limit,))
            timer.daemon = True
            timer.start()
        try:
            process.stdin.write(encode(message))
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # its end of the pipe is gone
            line = b""
        finally:
            if timer is not None:
                timer.cancel()
        if not line:
            raise ChildProcessError(_how_it_ended(process))
        self._read(line)

    def _read(self, line: bytes) -> None:
        answer = decode_answer(line)
        for text in answer.say:
            if text not in self._said:
                self._said.add(text)
                self._tell(f"{self.name}: {text}")
        if answer.error is not None:
            raise ChildProcessError(answer.error)

    def _expire(self, limit: float) -> None:
        self._expired = f"it did not answer within {limit:g} s"
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _end(self) -> None:
        """Nothing of the tracker is left when this returns."""
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        try:
            self._process.wait(0 if self._expired else _GRACE_S)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        return f"its process ended with exit code {process.wait(_GRACE_S)}"
    except subprocess.TimeoutExpired:  # it only closed its output
        return "its process answers no more"
