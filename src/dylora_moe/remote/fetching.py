"""A remote run folder -> a local one, or one file of it. Only reads."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dylora_moe.errors import RunError
from dylora_moe.remote.place import Place, patiently
from dylora_moe.remote.snapshots import Damaged, Snapshot, Snapshots
from dylora_moe.run_dir import CONFIG


def fetch_run(url: str, target: Path, tell: Callable[[str], None]) -> Snapshot:
    """Make a new folder what the newest sound snapshot of a run is.

    Raises:
        ConfigError: The address is none.
        RunError: There is no such run, none that is sound, or the folder is there and not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"a run is fetched into a new folder, and {target} is there. Give another with --output.")
    snapshots = Snapshots(Place(url))
    target.parent.mkdir(parents=True, exist_ok=True)
    # An empty folder that is there may be where another disk begins, or where the person is.
    beside = target if target.is_dir() else target.parent
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=beside) as name:
        for attempt in range(2):  # a run that goes on there deletes what it has newer ones of
            again = (lambda text: None) if attempt == 0 else tell
            found = patiently(lambda told=again: fetch_newest(snapshots, Path(name) / "run", told), url, tell)
            if found is not None:
                if not target.is_dir():
                    (Path(name) / "run").rename(target)
                    return found
                for path in sorted((Path(name) / "run").iterdir(), key=lambda path: path.name == CONFIG):
                    os.replace(path, target / path.name)
                return found
    raise RunError(
        f"{url} must be a remote run folder, remote_dir/run_name of a run, with a sound snapshot, and holds none."
    )


def fetch_newest(snapshots: Snapshots, folder: Path, tell: Callable[[str], None]) -> Snapshot | None:
    """Make a folder what the newest sound snapshot is; None, and no folder, where there is none."""
    for name, snapshot in snapshots.readable(tell):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            snapshots.fetch(snapshot, folder, tell)
        except Damaged as error:
            tell(f"The snapshot {name} in {snapshots.place.url} is not used: {error}.")
        else:
            return snapshot
    shutil.rmtree(folder, ignore_errors=True)
    return None


def read_remote(url: str, path: str, tell: Callable[[str], None] = lambda text: None) -> str | None:
    """A file of the newest snapshot that has it whole; None where there is none."""

    def read() -> str | None:
        snapshots = Snapshots(Place(url))
        with tempfile.TemporaryDirectory() as folder:
            for _, snapshot in snapshots.readable(lambda text: None):
                try:
                    snapshots.fetch_file(snapshot, path, target := Path(folder) / "file")
                except Damaged:
                    continue
                return target.read_text(encoding="utf-8")
        return None

    return patiently(read, url, tell)
