"""Remote folders of several kinds, and a file system that fails."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.remote.faults import failing
from tests.remote.s3 import s3

__all__ = ["failing", "s3"]


@pytest.fixture(params=["file", "memory", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a new remote folder."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{os.urandom(4).hex()}"
    return f"file://{tmp_path / 'remote'}" if request.param == "file" else f"memory://{os.urandom(4).hex()}"


@pytest.fixture
def told() -> list[str]:
    """What a person was told, by its `append`."""
    return []


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """(folder, files by path) -> the folder with these files and no others."""

    def make(name: str, files: dict[str, bytes]) -> Path:
        import shutil

        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder

    yield make
