"""Checkpoint folders: each appears complete or not at all, and is checked by its hashes before anything in it is read.

`checkpoints/step-000120/` holds the files that `fill` wrote and a manifest with their sizes and hashes, written last.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dylora_moe.cache.disk import hash_file, is_disk_full, sync
from dylora_moe.errors import RunError

MANIFEST = "manifest.json"
_FORMAT = 1
_PREFIX = "step-"


def write_checkpoint(parent: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Make the checkpoint of a step; only one process at a time may do so in a folder.

    Args:
        parent: Folder of all checkpoints of a run.
        step: Optimizer steps done.
        fill: Called with an empty folder to write files into.

    Raises:
        RunError: The folder cannot be written or its disk is full; earlier checkpoints are as they were.
    """
    folder = parent / f"{_PREFIX}{step:06d}"
    try:
        parent.mkdir(exist_ok=True)
        for leftover in parent.glob(f".{_PREFIX}*.part"):  # of a process that was killed here
            shutil.rmtree(leftover)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=parent))
        try:
            fill(temporary)
            _seal(temporary)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
            sync(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:  # safetensors wraps what the system says in an error of its own
        if isinstance(error, OSError) or is_disk_full(error):
            raise RunError(
                f"The checkpoint of step {step} must be written to {parent}, got {error}. Earlier checkpoints are "
                "kept: mend this, and the same command goes on from the newest."
            ) from error
        raise
    return folder


def _seal(folder: Path) -> None:
    """Write the manifest, last, and force everything to disk before the folder gets its name."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listed = {name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for name, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": listed}, indent=2) + "\n", encoding="utf-8")
    for path in (*files.values(), folder / MANIFEST, folder):
        sync(path)


def find_fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; None for a sound one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"it has format {manifest['format']}, and this version reads {_FORMAT}"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if hash_file(path) != expected["sha256"]:
                return f"{name} is not what was written: its hash differs"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def find_newest(parent: Path, *, tell: Callable[[str], None]) -> Path | None:
    """The newest sound checkpoint, None where there is none; what is wrong with newer ones is told."""
    for folder in reversed(_all(parent)):
        fault = find_fault(folder)
        if fault is None:
            return folder
        tell(f"The checkpoint {folder.name} is not used: {fault}.")
    return None


def prune(parent: Path, *, keep: int) -> None:
    """Delete all but the newest so many checkpoints."""
    for folder in _all(parent)[:-keep]:
        (folder / MANIFEST).unlink(missing_ok=True)  # first, so that half a folder never looks sound
        shutil.rmtree(folder)


def _all(parent: Path) -> list[Path]:
    """Checkpoints in the order of their steps."""
    folders = [path for path in parent.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(_PREFIX)))
