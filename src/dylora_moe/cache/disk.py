"""The disk: space checked before work starts, a full one recognised, writing that outlives a loss of power, hashes."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dylora_moe.errors import CacheError

_PIECE = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# safetensors (Rust) and pip (another process) tell only in words.
_FULL_TEXTS = (
    *(f"os error {code})" for code in sorted(_FULL)),
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
)


def check_free(folder: Path, need_bytes: int, what: str) -> None:
    """Refuse work for which `folder`'s disk has no room.

    Raises:
        CacheError: less than `need_bytes` are free.
    """
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise CacheError(
            f"{what} needs {gigabytes(need_bytes)} free in {folder}, got {gigabytes(free)}. "
            "Free some space, or set DYLORA_CACHE to a folder on a larger disk."
        )


def is_disk_full(error: BaseException | str) -> bool:
    """Whether an error, one behind it, or a program's message says that a disk, quota or file limit is full."""
    if isinstance(error, str):
        return any(text in error for text in _FULL_TEXTS)
    return any((isinstance(link, OSError) and link.errno in _FULL) or is_disk_full(str(link)) for link in chain(error))


def disk_full_error(folder: Path, what: str) -> CacheError:
    """The error for a disk that filled up during the work."""
    return CacheError(
        f"{what} needs disk space, and the disk, quota or file size limit of {folder} was reached; nothing "
        "half-written was kept. Free some space, or set DYLORA_CACHE (HF_HOME for hub models) to a larger disk."
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def gigabytes(num_bytes: int) -> str:
    """Bytes as text, in decimal gigabytes: 1359000000 -> '1.36 GB'."""
    return f"{num_bytes / 1e9:.2f} GB"


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; a file of any size in little memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
