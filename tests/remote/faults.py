"""A file system on the disk that fails when told: fsspec's own local one with faults of networks and of kills."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours catches it."""


class Failing(LocalFileSystem):
    """`failing:///folder`. Every operation is counted; at one of them, or from one on, something happens.

    Attributes:
        count: Operations so far.
        at: The operation to fail at; 0 for none.
        until: The last one to fail at.
        kind: `error` does nothing and raises; `lost` does it and raises, as where only the answer is lost; `cut` writes
            half and raises; `killed` writes half and ends the process.
    """

    protocol = "failing"
    cachable = False
    count, at, until, kind = 0, 0, 0, "error"

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("failing://") if isinstance(path, str) else path)

    @classmethod
    def plan(cls, at: int, kind: str = "error", *, until: int | None = None) -> None:
        cls.count, cls.at, cls.kind, cls.until = 0, at, kind, at if until is None else until

    def _count(self) -> str | None:
        cls = type(self)
        cls.count += 1
        return cls.kind if cls.at <= cls.count <= cls.until else None

    def _write(self, path: str, content: bytes) -> None:
        fault = self._count()
        target = Path(self._strip_protocol(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        if fault != "error":
            target.write_bytes(content[: len(content) // 2] if fault in ("cut", "killed") else content)
        self._raise(fault)

    def _raise(self, fault: str | None) -> None:
        if fault == "killed":
            raise Killed
        if fault is not None:
            raise ConnectionError("the network is away")

    def put_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        self._write(path2, Path(path1).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._write(path, value)

    def get_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        self._raise(self._count())
        super().get_file(path1, path2, **kwargs)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        self._raise(self._count())
        return super().cat_file(path, start, end, **kwargs)

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        self._raise(self._count())
        return super().ls(path, detail=detail, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        return super().info(path, **kwargs)

    def rm_file(self, path: str) -> None:
        fault = self._count()
        if fault != "error":
            super().rm_file(path)
        self._raise(fault)


@pytest.fixture
def failing() -> Iterator[type[Failing]]:
    """The file system, without faults until they are planned."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.plan(0)
    yield Failing
    Failing.plan(0)
