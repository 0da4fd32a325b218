"""Sends images of a run folder in the background, the newest one first: what a slow network lags behind is left out."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dylora_moe.remote.lease import Lease, Taken
from dylora_moe.remote.place import describe
from dylora_moe.remote.snapshots import Entry, Snapshot, Snapshots, describe_files

KEPT = 2
"""Snapshots that stay: the newest, and one to fall back to."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class _Over(Exception):
    """What is sent is wanted no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is still to be sent.

    Attributes:
        sent: Bytes that are there.
        total: Bytes in all; 0 while that is not known.
    """

    sent: int
    total: int


class Sender:
    """A thread that sends; its errors never reach the run, but are told once until it works again.

    Args:
        snapshots: Where to.
        lease: The right to write there.
        progress: Image -> how far the run was.
        tell: Takes what a person should know, from another thread.
        first_pause_s: Seconds to the second attempt; later ones take twice as long each.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        lease: Lease,
        progress: Callable[[Path], tuple[int, ...]],
        tell: Callable[[str], None],
        *,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._snapshots, self._lease, self._progress, self._tell = snapshots, lease, progress, tell
        self._first_pause_s = first_pause_s
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._waiting: Path | None = None
        self._sending: Path | None = None
        self._last: dict[str, Entry] | None = None
        self._over = self._hurries = False
        self._work = Work(sent=0, total=0)
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name="remote-sender", daemon=True)
        self._thread.start()

    def send(self, image: Path) -> None:
        """Send an image, which is the sender's from now on, in place of one that has waited."""
        with self._lock:
            before, self._waiting = self._waiting, image
        self._wake.set()
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    @property
    def is_idle(self) -> bool:
        """True when all that was given is there."""
        return self._waiting is None and self._sending is None

    def wait(self, seconds: float, show: Callable[[Work], None]) -> bool:
        """Wait until all is there, so many seconds at most; whether it is.

        Args:
            seconds: The longest time.
            show: Called every now and then with what is left.
        """
        end = time.monotonic() + seconds
        self._hurries = True
        self._wake.set()  # an attempt now
        while not self.is_idle and self._thread.is_alive() and time.monotonic() < end:
            show(self._work)
            time.sleep(0.05)
        return self.is_idle

    def close(self) -> None:
        """Send nothing more."""
        self._over = True
        self._wake.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        pause = self._first_pause_s
        while not self._over:
            with self._lock:
                if self._waiting is not None:
                    if self._sending is not None:
                        shutil.rmtree(self._sending, ignore_errors=True)
                    self._sending, self._waiting = self._waiting, None
            if self._sending is None:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                self._send(self._sending)
            except (_Over, Taken):  # the run itself looks at the lease
                return
            except Exception as error:
                if self._over:
                    return
                if self.error is None:
                    self._tell(
                        f"{self._snapshots.place.url} cannot be written ({describe(error)}). The run goes on, and "
                        "sends what is missing there as soon as it can."
                    )
                self.error = describe(error)
                self._wake.wait(self._first_pause_s if self._hurries else pause)
                self._wake.clear()
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            if self.error is not None:
                self._tell(f"{self._snapshots.place.url} can be written again.")
            self.error, pause = None, self._first_pause_s
            shutil.rmtree(self._sending, ignore_errors=True)
            self._sending = None

    def _send(self, image: Path) -> None:
        files = describe_files(image)
        if files == self._last:
            return
        self._work = Work(sent=0, total=sum(entry.bytes for entry in files.values()))
        snapshot = Snapshot(progress=self._progress(image), files=files)
        self._snapshots.write(snapshot, image, sent=self._count, check=self._check)
        self._last = files
        self._snapshots.prune(KEPT, check=self._check)

    def _count(self, num_bytes: int) -> None:
        self._work = Work(sent=self._work.sent + num_bytes, total=self._work.total)
        if self._over:
            raise _Over

    def _check(self) -> None:
        self._lease.check()
        if self._over:
            raise _Over
