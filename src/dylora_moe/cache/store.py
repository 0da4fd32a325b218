"""The cache on disk: each folder is built once, by one process, and appears complete or not at all."""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dylora_moe.cache.disk import check_free, disk_full_error, is_disk_full, sync
from dylora_moe.errors import CacheError, DyLoraError

MANIFEST = "manifest.json"
# Raised when the same identity gives another folder than before, so that older caches are built again.
_FORMAT = 1
_KEPT_DAYS = 60
_UNUSABLE = (PermissionError, NotADirectoryError, FileExistsError)


def cache_folder(cache_dir: Path | None, environment: Mapping[str, str]) -> Path:
    """Where everything is kept: `cache_dir`, $DYLORA_CACHE or a folder in the user's cache, the first that is set."""
    if cache_dir is not None:
        return Path(cache_dir)
    if own := environment.get("DYLORA_CACHE"):
        return Path(os.path.expanduser(own))
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "dylora-moe"


def materialise(
    folder: Path,
    build: Callable[[Path, Path], None],
    *,
    identity: str,
    need_bytes: int,
    progress: Callable[[str], None],
) -> Path:
    """Return `folder`, building it first where no complete one is there.

    Args:
        folder: the finished folder; its parent is made.
        build: called with an empty scratch folder and the empty folder to fill; both on `folder`'s disk.
        identity: what the content was made from; a folder made from something else is replaced.
        need_bytes: free space that `build` needs at its peak.
        progress: told when another process is being waited for.

    Raises:
        CacheError: the disk is too small or the cache cannot be written; nothing half-written stays.
    """
    if is_complete(folder, identity):
        with suppress(OSError):  # of a cache that others own
            os.utime(folder / MANIFEST)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress):
            if not is_complete(folder, identity):
                _remove_leftovers(folder)
                check_free(folder.parent, need_bytes, f"Preparing {folder.name}")
                _build_and_rename(folder, build, identity)
    except DyLoraError:  # whatever words it has
        raise
    except Exception as error:  # conversion libraries wrap a full disk in errors of their own
        if is_disk_full(error):
            raise disk_full_error(folder.parent, f"Preparing {folder.name}") from error
        if isinstance(error, _UNUSABLE) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            raise CacheError(
                f"The cache must be a folder that can be written, got {error}. "
                "Set DYLORA_CACHE to a folder that you may write to."
            ) from error
        raise
    return folder


def is_complete(folder: Path, identity: str) -> bool:
    """Whether the folder's manifest fits and every file has the size that it lists (contents are not read)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["identity"]) != (_FORMAT, identity):
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def forget_unused(parent: Path, *, days: float = _KEPT_DAYS) -> None:
    """Delete folders that nobody asked `materialise` for in so many days, and what killed builds left in `parent`."""
    oldest = time.time() - days * 86_400
    for manifest in parent.glob(f"*/{MANIFEST}"):
        with suppress(OSError):
            if manifest.stat().st_mtime < oldest:
                manifest.unlink()  # first, so that half a folder never looks complete
                shutil.rmtree(manifest.parent)
    for leftover in parent.glob(".*.part"):
        name = leftover.name[1:].rsplit(".", 2)[0]
        with suppress(OSError, Timeout), FileLock(parent / f".{name}.lock").acquire(timeout=0):
            shutil.rmtree(leftover)  # whoever builds holds the lock


@contextmanager
def _locked(folder: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process dies."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that is preparing {folder.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left. Called under the lock, so nobody is at work in these."""
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


def _build_and_rename(folder: Path, build: Callable[[Path, Path], None], identity: str) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        scratch, result = work / "scratch", work / "result"
        scratch.mkdir()
        result.mkdir()
        build(scratch, result)
        _seal(result, identity)
        os.replace(result, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _seal(result: Path, identity: str) -> None:
    """Write the manifest, last, and force everything to disk before the folder gets its name."""
    files = {path.relative_to(result).as_posix(): path.stat().st_size for path in result.rglob("*") if path.is_file()}
    manifest = {"format": _FORMAT, "identity": identity, "files": files}
    (result / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in (*files, MANIFEST):
        sync(result / name)
    sync(result)
