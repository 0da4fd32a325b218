"""One writer of a remote folder at a time: whoever writes says so, again and again, in a file there.

No clock of another machine is trusted: a writer is gone when its file stays the same for a minute of ours. A machine
that slept and was taken for gone finds another's name in the file, and writes no more.
"""

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dylora_moe.errors import OnlyHere, RunError
from dylora_moe.remote.place import Place

_FILE = "writer.json"
BEAT_S, PATIENCE_S = 15.0, 60.0
_LOOK_S = 2.0


class Taken(OnlyHere):
    """Another process writes where this one did."""


class Lease:
    """The right to write, held from `acquire` to `release`.

    Args:
        place: The remote folder of a run.
        tell: Takes what a person should know.
        beat_s: Seconds between two signs of life.
        patience_s: Seconds without one after which another writer is taken for gone.
    """

    def __init__(
        self, place: Place, tell: Callable[[str], None], *, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S
    ) -> None:
        self._place, self._tell = place, tell
        self._beat_s, self._patience_s = beat_s, patience_s
        self._token, self._beats = secrets.token_hex(8), 0
        self._over = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._keep, name="remote-lease", daemon=True)

    def acquire(self) -> None:
        """Take it, after a wait where another writer may be gone.

        Raises:
            RunError: Another process writes there.
        """
        there = self._read()
        # Its own name is there where the answer to an attempt was lost.
        if there and there.get("token") != self._token and not _is_gone(there):
            self._tell(
                f"{self._place.url} was last written by {_who(there)}. Waiting up to {self._patience_s:.0f} s to see "
                "whether it still is."
            )
            self._wait_for(there)
        self._write()
        self.check()
        self._thread.start()

    def _wait_for(self, there: dict[str, Any]) -> None:
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            time.sleep(min(_LOOK_S, self._patience_s / 4))
            now = self._read()
            if not now:
                return
            if now != there:
                raise RunError(
                    f"{self._place.url} must have one writer at a time, and {_who(now)} writes there. Wait for it or "
                    "stop it, or choose another --run_name."
                )

    def check(self) -> None:
        """See that it is still held.

        Raises:
            Taken: It is not.
        """
        if self._lost is None and (there := self._read()) and there.get("token") != self._token:
            self._lost = _who(there)
        self.check_known()

    def check_known(self) -> None:
        """As `check`, by what was seen last, without the network."""
        if self._lost is not None:
            raise Taken(
                f"{self._place.url} must have one writer at a time, and {self._lost} has taken it over, as if this "
                "process were gone. What is here is kept; stop one of the two."
            )

    def release(self) -> None:
        """Give it back, so that the next writer need not wait. Errors of the network are left to its patience."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        try:
            if self._lost is None and self._read().get("token") == self._token:
                self._place.delete(_FILE)
        except Exception:
            return

    def _keep(self) -> None:
        while not self._over.wait(self._beat_s):
            try:
                self.check()
                self._write()
            except Taken:
                return
            except Exception:  # the network; who sends tells of it
                continue

    def _read(self) -> dict[str, Any]:
        """Who writes; empty where nobody does. What cannot be read is somebody, too."""
        try:
            content = self._place.read(_FILE)
        except FileNotFoundError:
            return {}
        try:
            record = json.loads(content)
            return record if isinstance(record, dict) and record else {"token": repr(content)}
        except ValueError:
            return {"token": repr(content)}

    def _write(self) -> None:
        self._beats += 1
        record = {
            "token": self._token,
            "beat": self._beats,
            "host": platform.node(),
            "process": os.getpid(),
            "machine": _machine(),
            "began": _began(os.getpid()),
            "since": time.strftime("%F %T %z"),
        }
        self._place.write(_FILE, json.dumps(record).encode())


def _is_gone(there: dict[str, Any]) -> bool:
    """Whether the writer was a process of this machine that is no more."""
    if (there.get("host"), there.get("machine")) != (platform.node(), _machine()):
        return False
    try:
        return _began(there["process"]) != there["began"]
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False


def _machine() -> str:
    """What tells this machine, since it was started, from others of its name, and containers of one name apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux: there are no containers, and names are people's
        return ""


def _began(process: int) -> float | None:
    """When a process began, by a clock that nobody sets where there is one; None where there is no such process."""
    try:
        # Behind the name, which may hold anything, in brackets: 20th of proc(5)'s fields from the third on.
        fields = Path(f"/proc/{int(process)}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return float(fields.split()[19])
    except FileNotFoundError:
        return psutil.Process(process).create_time() if psutil.pid_exists(process) else None


def _who(there: dict[str, Any]) -> str:
    return f"process {there.get('process', '?')} on {there.get('host', 'an unknown machine')}"
