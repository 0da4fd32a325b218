"""The address of a remote folder -> its file system, and the few things that are done there.

Errors of a network are retried by who calls; here they are told from mistakes that no waiting mends.
"""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dylora_moe.cache.disk import is_disk_full
from dylora_moe.config.remote import check_url, without_secrets
from dylora_moe.errors import ConfigError, RunError

_Result = TypeVar("_Result")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcp", "gcs": "gcp"}
# Seconds between attempts at the start of a run, about a minute in all.
_PAUSES_S = (1, 2, 4, 8, 15, 30)


class Place:
    """A remote folder. Paths are relative to it, with slashes.

    Args:
        url: Of the folder, without credentials, which its client finds in the environment.

    Raises:
        ConfigError: It is no address, or the client for it is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            check_url(url)
        except ValueError as error:
            raise ConfigError(f"a remote folder {error}, got {without_secrets(url)}.") from error
        self.url = url.rstrip("/")
        scheme = url.partition(":")[0]
        # Folders need to be made on disks alone.
        options: dict[str, Any] = {"auto_mkdir": True} if scheme in ("file", "local") else {}
        try:
            files, root = fsspec.url_to_fs(self.url, **options)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            install = f"pip install 'dylora-moe[{extra}]'" if extra else without_secrets(str(error))
            raise ConfigError(f"{self.url} needs a client that is not installed: {install}.") from error
        except ValueError as error:
            raise ConfigError(f"{self.url} must begin with a scheme that fsspec knows, got: {error}.") from error
        self._files, self._root = files, str(root).rstrip("/")

    @property
    def disk(self) -> Path | None:
        """Where it is on this machine; None for one that is elsewhere."""
        return Path(self._root).resolve() if isinstance(self._files, LocalFileSystem) else None

    def list(self, folder: str) -> dict[str, int]:
        """Name -> bytes of each file in a folder; empty where there is no such folder."""
        path = self._path(folder)
        self._files.invalidate_cache()
        try:
            found = self._files.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        return {str(entry["name"]).rsplit("/", 1)[-1]: entry["size"] for entry in found if entry["type"] == "file"}

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: There is none.
        """
        content = self._files.cat_file(self._path(name))
        return content if isinstance(content, bytes) else bytes(content)

    def write(self, name: str, content: bytes) -> None:
        """A small file; who reads it meanwhile gets the old one or the new one, whole."""
        path = self._path(name)
        if self.disk is None:  # object stores replace objects whole
            self._files.pipe_file(path, content)
            return
        temporary = f"{path}.{secrets.token_hex(4)}.part"
        try:
            self._files.pipe_file(temporary, content)
            self._files.mv(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                self._files.rm_file(temporary)

    def send(self, source: Path, name: str) -> None:
        """Copy a file there, and see that all of it has arrived.

        Raises:
            OSError: It has not.
        """
        size = source.stat().st_size
        self._files.put_file(str(source), self._path(name))
        self._files.invalidate_cache()
        if (arrived := self._files.info(self._path(name))["size"]) != size:
            raise OSError(f"{name} has {arrived} bytes there instead of {size}")

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file from there; it is not looked at.

        Raises:
            FileNotFoundError: There is none.
        """
        self._files.get_file(self._path(name), str(target))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def patiently(
    act: Callable[[], _Result], url: str, tell: Callable[[str], None], *, pause: Callable[[float], None] = time.sleep
) -> _Result:
    """Do what needs the network, again and again for a minute: before training there is nothing else to do.

    Args:
        act: To be done.
        url: Of the remote folder, for people.
        tell: Takes what a person should know.
        pause: Waits so many seconds.

    Raises:
        RunError: It cannot be done, because of the network or because of what no waiting mends.
    """
    for seconds in (*_PAUSES_S, None):
        try:
            return act()
        except (ConfigError, RunError):
            raise
        except Exception as error:
            if is_disk_full(error):
                raise RunError(f"{url} must fit on this machine's disk, got: {error}.") from error
            if seconds is None or isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
                raise RunError(
                    f"{url} must be a remote folder that can be read and written now, got {describe(error)}. Look at "
                    "the address, the network, and the credentials in the environment."
                ) from error
            if seconds == _PAUSES_S[0]:
                tell(f"{url} cannot be reached ({describe(error)}). Trying again for a minute ...")
            pause(seconds)
    raise AssertionError("not reached")


def describe(error: BaseException) -> str:
    """An error in one line, without secrets."""
    text = " ".join(without_secrets(str(error)).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
