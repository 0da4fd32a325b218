"""A run folder and its mirror in a remote folder: what is there and not here is fetched, what is new here is sent.

An image of the run folder can be sent at any moment between two writes of the run, since a run goes on from whatever
SIGKILL leaves. So nothing here asks what a run is doing.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dylora_moe import ranks
from dylora_moe.cache.disk import sync
from dylora_moe.config import RunConfig
from dylora_moe.errors import ConfigError, RunError
from dylora_moe.evaluate.load import read_config
from dylora_moe.remote.lease import Lease, Taken
from dylora_moe.remote.place import Place, describe, patiently
from dylora_moe.remote.sender import Sender, Work
from dylora_moe.remote.snapshots import Damaged, Snapshot, Snapshots
from dylora_moe.remote.staging import stage
from dylora_moe.run_dir import (
    CHECKPOINTS,
    CONFIG,
    DECISION,
    REMOTE,
    RESULT,
    STAGE,
    START,
    UNDONE,
    RunDir,
    stage_folders,
)
from dylora_moe.train.checkpoint import find_newest
from dylora_moe.train.folder import LINES_ELSEWHERE, differences
from dylora_moe.train.session import Stages
from dylora_moe.train.stopping import Stopped, StopSignals
from dylora_moe.train.stream import MAY_CHANGE

END_S, GRACE_S = 600.0, 20.0
"""Seconds to send the rest in: at the end, and when told to end, which a machine that is taken away grants 30 for."""
_SHOW_S = 5.0
_REPLACING, _FETCHED, _THEIRS = "replacing", "fetched", "theirs"


@contextmanager
def mirrored(config: RunConfig, run: RunDir, stages: Stages, stop: StopSignals) -> Iterator[Stages]:
    """Inside the block the run folder, which is locked, is mirrored, if the settings say so.

    Gives the stages with `saved`, to be called when there is something new to go on from.

    Raises:
        ConfigError: The remote folder is none, or lies in the run folder.
        RunError: The remote folder cannot be reached at the start or by the end, has another run, or another writer.
    """
    if config.remote_dir is None:
        yield stages
        return
    if not ranks.is_first():
        ranks.by_first(lambda: None)  # until the folder is what is gone on from
        yield stages
        return
    mirror = Mirror(config, run, stages.tell)
    try:
        ranks.by_first(mirror.open)
        try:
            yield replace(stages, saved=mirror.save)
        except BaseException:
            stop.announce = lambda line: None  # the launcher of several processes tells them to end who are ending
            with stop.deferred():
                mirror.push_briefly()
            raise
        try:
            mirror.push(END_S)
        except Stopped:
            mirror.push_briefly()
            raise
    finally:
        mirror.close()


class Mirror:
    """The remote folder of one run.

    Args:
        config: Of the run.
        run: Its folder.
        tell: Takes what a person should know.
    """

    def __init__(self, config: RunConfig, run: RunDir, tell: Callable[[str], None]) -> None:
        assert config.remote_dir is not None
        self._config, self._run, self._tell = config, run, tell
        self._snapshots = Snapshots(Place(f"{config.remote_dir.rstrip('/')}/{config.run_name}"))
        self.url = self._snapshots.place.url
        if (disk := self._snapshots.place.disk) is not None and disk.is_relative_to(run.path.resolve()):
            raise ConfigError(f"remote_dir must not be where runs work, output_dir, got {config.remote_dir} for both.")
        self._lease = Lease(self._snapshots.place, tell)
        self._sender: Sender | None = None
        self._scratch = run / REMOTE
        self._images = 0
        self._staging_error: str | None = None

    def open(self) -> None:
        """Become the one writer, and bring the local folder to where the remote one is, if that is further."""
        if (self._scratch / _REPLACING).exists():  # the process died in the middle of it
            _clear(self._run)
        self._check_here()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        patiently(self._lease.acquire, self.url, self._tell)
        if (fetched := patiently(self._fetch, self.url, self._tell)) is not None:
            self._take(fetched)
        self._sender = Sender(self._snapshots, self._lease, lambda image: how_far(RunDir(image)), self._tell)

    def _check_here(self) -> None:
        """See that the local folder is new or this run's, before it is compared, replaced or sent.

        Raises:
            RunError: It is neither.
        """
        changed = ""
        if not self._run.is_empty and not (self._run / CONFIG).is_file():
            changed = "it is no run"
        elif not self._is_new:
            changed = self._differences(self._run)
        if changed:
            raise RunError(
                f"a run folder must be new or hold this run, and {self._run.path} holds something else: {changed}. "
                "Go on with its own settings, or choose another --run_name; nothing was changed."
            )

    @property
    def _is_new(self) -> bool:
        """Whether the local folder has nothing to go on from; a stream has not before its base is measured."""
        return self._run.is_empty or (self._config.mode == "continual" and not (self._run / START).is_file())

    def _differences(self, other: RunDir) -> str:
        may_change = MAY_CHANGE if self._config.mode == "continual" else LINES_ELSEWHERE
        return differences(read_config(other), self._config, also_harmless=may_change)

    def _fetch(self) -> Path | None:
        """A folder with the newest sound snapshot; None where the local folder is as far."""
        here = None if self._is_new else how_far(self._run)
        found = False
        for name, snapshot in self._snapshots.readable(self._tell):
            found = True
            try:
                self._check_same(snapshot)
                if here is not None and snapshot.progress <= here:
                    return None
                total = sum(entry.bytes for entry in snapshot.files.values())
                self._tell(f"Fetching {len(snapshot.files)} files, {total / 1e6:.1f} MB, from {self.url} ...")
                fetched = self._scratch / _FETCHED / name
                self._snapshots.fetch(snapshot, fetched, self._tell)
            except Damaged as error:
                self._tell(f"The snapshot {name} in {self.url} is not used: {error}.")
                continue
            self._tell("Fetched, and all of it is what was sent.")
            return fetched
        if found and here is None:
            self._tell(f"Nothing in {self.url} can be used: the run begins anew.")
        return None

    def _check_same(self, snapshot: Snapshot) -> None:
        """See that the run there is this one.

        Raises:
            RunError: It is another.
            Damaged: That cannot be told.
        """
        theirs = RunDir(self._scratch / _THEIRS)
        self._snapshots.fetch_file(snapshot, CONFIG, theirs / CONFIG)
        if changed := self._differences(theirs):
            raise RunError(
                f"{self.url} holds a run with other settings: {changed}. Go on with its own, or choose another "
                "--run_name; nothing was changed."
            )
        if self._config.resume == "never" and RESULT not in snapshot.files:
            raise RunError(
                f"{self.url} holds a run that did not finish, and resume is never. Go on with --resume auto, or choose "
                "another --run_name; nothing was changed."
            )

    def _take(self, fetched: Path) -> None:
        """Put what was fetched in the place of the run folder's content; a process that dies here does it again."""
        (self._scratch / _REPLACING).touch()
        sync(self._scratch)
        _clear(self._run)
        for path in sorted(fetched.iterdir()):
            os.replace(path, self._run / path.name)
        sync(self._run.path)
        (self._scratch / _REPLACING).unlink()

    def save(self) -> None:
        """Have the run folder sent as it is now; takes no longer than copying its small files.

        Raises:
            RunError: Another process writes there now.
        """
        self._lease.check_known()
        if self._sender is None:
            return
        self._images += 1
        image = self._scratch / f"image-{self._images}"
        try:
            if self._is_new:
                return
            stage(self._run.path, image)
        except OSError as error:
            shutil.rmtree(image, ignore_errors=True)
            if self._staging_error is None:
                self._tell(f"{self.url} is not brought up to date for now: {describe(error)}. The run goes on.")
            self._staging_error = describe(error)
            return
        self._staging_error = None
        self._sender.send(image)

    def push(self, seconds: float) -> None:
        """Send all that is left.

        Raises:
            RunError: Not all is there after so many seconds.
        """
        self.save()
        if self._sender is None:
            return
        if self._sender.wait(seconds, self._shown()) and self._staging_error is None:
            self._tell(f"{self.url} has all of the run.")
            return
        self._lease.check_known()
        raise RunError(
            f"{self.url} must have all of the run in {self._run.path}, and lacks the last of it: "
            f"{self._staging_error or self._sender.error or f'{seconds:.0f} s were too short'}. The same command "
            "sends the rest."
        )

    def push_briefly(self) -> None:
        """As `push`, in the time that a machine has which is taken away; what cannot be sent is told."""
        try:
            self.push(GRACE_S)
        except Taken:  # which is why the run ends
            return
        except RunError as error:
            self._tell(str(error))

    def close(self) -> None:
        """Send no more, and let others write."""
        if self._sender is not None:
            self._sender.close()
        self._lease.release()
        if not (self._scratch / _REPLACING).exists():
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _shown(self) -> Callable[[Work], None]:
        due = time.monotonic() + 1

        def show(work: Work) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + _SHOW_S
                of = f"{work.sent / 1e6:.1f} of {work.total / 1e6:.1f} MB" if work.total else "nothing yet"
                self._tell(f"Sending to {self.url}: {of} ...")

        return show


def how_far(run: RunDir) -> tuple[int, ...]:
    """How far a run is, to be compared with itself elsewhere.

    The first number counts how often its stream was taken back; then come stages that count, whether it has its
    result, and of the stage at hand or of the run: whether it was decided, its newest sound checkpoint, its result.
    """
    stages = stage_folders(run)
    counting = [stage for stage in stages if (stage / STAGE).is_file()]
    current = next((RunDir(stage) for stage in stages if stage not in counting), run)
    newest = find_newest(current / CHECKPOINTS, tell=lambda text: None)
    return (
        sum(1 for path in run.path.glob(f"{UNDONE}/*") if path.is_dir()),
        len(counting),
        int(run.is_finished),
        int((current / DECISION).is_file()),
        -1 if newest is None else int(newest.name.removeprefix("step-").partition(".")[0]),
        int(current.is_finished),
    )


def _clear(run: RunDir) -> None:
    """Delete all of a run folder but what is hidden: its lock, and what was fetched."""
    for path in run.path.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
