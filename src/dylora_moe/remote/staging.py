"""A run folder as it is now, beside itself: what is sent from there stays as it is while the run goes on."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dylora_moe.run_dir import CHECKPOINTS, FINAL

# Files that are never written to once they have their name: such a folder is replaced whole.
_UNCHANGING = {CHECKPOINTS, FINAL}


def stage(run: Path, into: Path) -> None:
    """Make a new folder the image of a run folder, hidden files left out; large files by links where that can be.

    It is called between two writes of the run, so that the image is one moment's.
    """
    for name in visible_files(run):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            copy_shared(run / name, into / name, name)
        except FileNotFoundError:  # of a tracker, whose process writes when it likes
            continue


def copy_shared(source: Path, target: Path, name: str) -> None:
    """Copy a file of a run, or give it a second name where it never changes and the file system can.

    Args:
        source: To be copied.
        target: Its new place.
        name: Its path in the run folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_unchanging(name):
        try:
            os.link(source, target)
            return
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            pass
    shutil.copyfile(source, target)


def is_unchanging(name: str) -> bool:
    """Whether a file of a run, by its path in the run folder, stays as it is once it is there."""
    return bool(_UNCHANGING & set(name.split("/")))


def visible_files(folder: Path) -> Iterator[str]:
    """Paths of all files in a folder, without links and without what is hidden or in a hidden folder."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and not path.is_symlink():
                yield path.relative_to(folder).as_posix()
