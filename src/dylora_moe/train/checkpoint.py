"""Checkpoint folders: each appears complete or not at all, and is checked by its hashes before anything in it is read.

`checkpoints/step-000120/` holds the files that `fill` wrote and a manifest with their sizes and hashes, written last.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dylora_moe.cache.disk import hash_file, is_disk_full, sync
from dylora_moe.errors import RunError

MANIFEST = "manifest.json"
_FORMAT = 3
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")


def write_checkpoint(parent: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Make the checkpoint of a step; only one process at a time may do so in a folder.

    Args:
        parent: Folder of all checkpoints of a run.
        step: Optimizer steps done.
        fill: Called with an empty folder to write files into.

    Raises:
        RunError: The folder cannot be written or its disk is full; earlier checkpoints are as they were.
    """
    try:
        parent.mkdir(exist_ok=True)
        for leftover in parent.glob(".step-*.part"):  # of a process that was killed here
            shutil.rmtree(leftover)
        folder = _new_folder(parent, step)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=parent))
        try:
            fill(temporary)
            _seal(temporary)
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
    """Why a checkpoint cannot be used; None for a sound one.

    Raises:
        RunError: It cannot be read at the moment.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"it has format {manifest['format']}, and this version reads {_FORMAT}"
        if not manifest["files"]:
            return f"{MANIFEST} lists no files"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if hash_file(path) != expected["sha256"]:
                return f"{name} is not what was written: its hash differs"
    except (FileNotFoundError, NotADirectoryError):
        return f"{MANIFEST} is missing"
    except OSError as error:  # no verdict on the checkpoint: the disk or its network may be back in a minute
        raise RunError(f"{folder} must be readable to see whether it is sound, got: {error}. Mend this.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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


def find_step(parent: Path, step: int) -> Path | None:
    """The checkpoint of a step, the last one made where there are several; None where there is none."""
    return next((folder for folder in reversed(_all(parent)) if _key(folder)[0] == step), None)


def prune(parent: Path, *, step: int, keep: int, needed: Callable[[Path], int | None] = lambda folder: None) -> None:
    """Delete all checkpoints but the newest so many steps' and those that they need.

    Args:
        parent: Folder of all checkpoints of a run.
        step: Of the newest one. Later ones are those that were not sound when the run went on from before them; they
            do not count, and stay until there is another one of their step.
        keep: How many to keep; of several of one step only the newest counts.
        needed: Checkpoint -> the step of another that must be there with it.
    """
    newest = {_key(folder)[0]: folder for folder in _all(parent)}
    kept = sorted(other for other in newest if other <= step)[-keep:]
    steps = {*kept, *(needed(newest[other]) for other in kept)}
    for folder in _all(parent):
        other = _key(folder)[0]
        if folder != newest[other] or (other <= step and other not in steps):
            (folder / MANIFEST).unlink(missing_ok=True)  # first, so that half a folder never looks sound
            shutil.rmtree(folder)


def _new_folder(parent: Path, step: int) -> Path:
    """One that is not there yet: a second checkpoint of a step stands beside the first until it is complete."""
    numbers = [number for other, number in map(_key, _all(parent)) if other == step]
    return parent / (f"step-{step:06d}.{max(numbers) + 1}" if numbers else f"step-{step:06d}")


def _all(parent: Path) -> list[Path]:
    """Checkpoints in the order in which they were made."""
    return sorted((path for path in parent.glob("step-*") if _NAME.fullmatch(path.name)), key=_key)


def _key(folder: Path) -> tuple[int, int]:
    """Step, and number among those of one step."""
    found = _NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)
