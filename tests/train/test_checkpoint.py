"""A checkpoint is there whole or not at all, and one that was damaged is passed over with the reason."""

import json
import os
import pickle
import signal
from pathlib import Path

import pytest

from dylora_moe.errors import RunError
from dylora_moe.train.checkpoint import find_fault, find_newest, find_step, prune, write_checkpoint

FILES = {"a.bin": b"\x00" * 1000, "inner/b.json": b'{"x": 1}'}


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def newest(parent: Path) -> tuple[str | None, list[str]]:
    told: list[str] = []
    found = find_newest(parent, tell=told.append)
    return found and found.name, told


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    for step in (5, 20, 100):
        write_checkpoint(tmp_path / "checkpoints", step, fill)
    return tmp_path / "checkpoints"


def test_the_newest_is_found_and_has_what_was_written(parent: Path) -> None:
    assert newest(parent) == ("step-000100", [])
    assert {name: (parent / "step-000100" / name).read_bytes() for name in FILES} == FILES
    assert newest(parent.parent / "none") == (None, [])


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "empty"])
def test_a_damaged_file_makes_the_one_before_count(parent: Path, name: str, damage: str) -> None:
    path = parent / "step-000100" / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    found, told = newest(parent)
    assert found == "step-000020"
    assert len(told) == 1 and told[0].startswith("The checkpoint step-000100 is not used: ")
    if damage == "flip" and name in FILES:
        assert f"{name} is not what was written" in told[0]


def test_what_a_killed_process_left_is_no_checkpoint_and_is_cleared(parent: Path) -> None:
    half = parent / ".step-000200.abc.part"
    half.mkdir()
    fill(half)
    assert newest(parent)[0] == "step-000100"
    write_checkpoint(parent, 200, fill)
    assert not half.exists() and newest(parent)[0] == "step-000200"


def test_a_checkpoint_that_fails_leaves_the_others_and_nothing_else(parent: Path) -> None:
    def break_off(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    before = sorted(parent.rglob("*"))
    with pytest.raises(RunError, match=r"step 101 must be written.*No space left.*Earlier checkpoints are kept"):
        write_checkpoint(parent, 101, break_off)
    assert sorted(parent.rglob("*")) == before


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    """The system's limit on the size of a file stands for a full disk: writing fails in the same way."""
    resource = pytest.importorskip("resource")

    def fill_much(folder: Path) -> None:
        (folder / "big.bin").write_bytes(b"x" * 200_000)

    write_checkpoint(tmp_path, 1, fill)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RunError, match="File too large"):
            write_checkpoint(tmp_path, 2, fill_much)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert newest(tmp_path) == ("step-000001", [])


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_a_second_checkpoint_of_a_step_stands_beside_the_first_until_it_is_complete(parent: Path) -> None:
    def look(folder: Path) -> None:
        assert find_fault(parent / "step-000100") is None
        fill(folder)

    write_checkpoint(parent, 100, look)
    assert newest(parent) == ("step-000100.1", [])
    assert find_step(parent, 100) == parent / "step-000100.1"
    write_checkpoint(parent, 100, look)
    prune(parent, step=100, keep=2)
    assert names(parent) == ["step-000020", "step-000100.2"]


def test_what_a_kept_checkpoint_needs_is_kept(parent: Path) -> None:
    prune(parent, step=100, keep=1, needed=lambda folder: 5 if folder.name == "step-000100" else None)
    assert names(parent) == ["step-000005", "step-000100"]


def test_later_checkpoints_than_the_newest_are_those_that_were_not_sound(parent: Path) -> None:
    """The run went on from before them, so they must not take the place of sound ones."""
    (parent / "step-000100" / "a.bin").write_bytes(b"")
    write_checkpoint(parent, 30, fill)
    prune(parent, step=30, keep=1)
    assert names(parent) == ["step-000030", "step-000100"]
    write_checkpoint(parent, 100, fill)
    prune(parent, step=100, keep=1)
    assert names(parent) == ["step-000100.1"]


def test_what_cannot_be_read_now_is_no_damage(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that is away for a minute must not make a run begin again."""

    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("dylora_moe.train.checkpoint.hash_file", fail)
    with pytest.raises(RunError, match=r"must be readable to see whether it is sound.*Input/output error"):
        newest(parent)


def test_a_manifest_of_nothing_is_none(parent: Path) -> None:
    (parent / "step-000100" / "manifest.json").write_text('{"format": 3, "files": {}}')
    assert find_fault(parent / "step-000100") == "manifest.json lists no files"


def test_the_newest_are_kept_by_their_number(parent: Path) -> None:
    prune(parent, step=100, keep=2)
    assert sorted(path.name for path in parent.iterdir()) == ["step-000020", "step-000100"]


def test_a_format_of_another_version_is_passed_over(parent: Path) -> None:
    manifest = parent / "step-000100" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))
    assert "format 1" in (find_fault(parent / "step-000100") or "")


class Mark:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_the_place_of_a_file_does_nothing(parent: Path, tmp_path: Path) -> None:
    for name in (*FILES, "manifest.json", "optimizer.pt"):
        (parent / "step-000100" / name).write_bytes(pickle.dumps(Mark(tmp_path / "opened")))
    assert newest(parent)[0] == "step-000020"
    assert not (tmp_path / "opened").exists()
