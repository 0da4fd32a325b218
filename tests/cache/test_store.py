"""The cache on disk: complete or not there, one builder at a time, clean after any failure."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from dylora_moe.cache.store import MANIFEST, cache_folder, forget_unused, is_complete, materialise
from dylora_moe.errors import CacheError

# Forked, so that a process starts in milliseconds; nothing in them touches torch.
fork = multiprocessing.get_context("fork")


def build(scratch: Path, result: Path) -> None:
    (scratch / "model.gguf").write_bytes(b"x" * 100)
    (result / "config.json").write_text("{}")
    (result / "model.safetensors").write_bytes(b"y" * 1000)


def prepare(folder: Path, builder: Callable[[Path, Path], None] = build, **changes: object) -> Path:
    arguments: dict = {"identity": "one", "need_bytes": 1, "progress": lambda line: None} | changes
    return materialise(folder, builder, **arguments)


def visible(folder: Path) -> list[str]:
    """All that lies in the cache, without the lock files."""
    return sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".lock")


def test_the_folder_is_built_once(tmp_path: Path) -> None:
    calls = []
    for _ in range(2):
        folder = prepare(tmp_path / "a" / "base", lambda scratch, result: (calls.append(1), build(scratch, result))[0])
    assert len(calls) == 1
    assert visible(folder) == ["base"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", MANIFEST, "model.safetensors"]


@pytest.mark.parametrize("spoil", ["truncate", "delete", "no manifest", "broken manifest", "other identity"])
def test_a_folder_that_is_not_what_its_manifest_says_is_built_again(tmp_path: Path, spoil: str) -> None:
    folder = prepare(tmp_path / "base")
    if spoil == "truncate":
        (folder / "model.safetensors").write_bytes(b"y" * 999)
    elif spoil == "delete":
        (folder / "config.json").unlink()
    elif spoil == "no manifest":
        (folder / MANIFEST).unlink()
    elif spoil == "broken manifest":
        (folder / MANIFEST).write_text('{"format": 1')
    identity = "two" if spoil == "other identity" else "one"
    assert not is_complete(folder, identity)
    prepare(folder, identity=identity)
    assert is_complete(folder, identity)
    assert (folder / "model.safetensors").stat().st_size == 1000


def test_nothing_stays_when_building_fails(tmp_path: Path) -> None:
    def fail(scratch: Path, result: Path) -> None:
        build(scratch, result)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "base", fail)
    assert visible(tmp_path / "base") == []


def test_too_little_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    def never(scratch: Path, result: Path) -> None:
        raise AssertionError("must not be called")

    with pytest.raises(CacheError, match=r"Preparing base needs 1000000.00 GB free .* got .* DYLORA_CACHE"):
        prepare(tmp_path / "base", never, need_bytes=10**15)
    assert visible(tmp_path / "base") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("writer", ["file", "safetensors"])
def test_a_disk_that_fills_up_is_named_and_left_clean(small_disk: Path, writer: str) -> None:
    def fill(scratch: Path, result: Path) -> None:
        if writer == "file":
            (result / "model.safetensors").write_bytes(b"y" * (8 << 20))
        else:
            import torch
            from safetensors.torch import save_file

            save_file({"weight": torch.zeros(2 << 20)}, result / "model.safetensors")

    with pytest.raises(CacheError, match=r"disk, quota or file size limit of .* was reached; nothing half-written"):
        prepare(small_disk / "base", fill)
    assert visible(small_disk / "base") == []
    assert shutil.disk_usage(small_disk).free > 3 << 20


def run(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = fork.Process(target=target, args=arguments)
    process.start()
    return process


def limited(folder: Path, log: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    try:
        prepare(folder)
    except CacheError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.write_text(str(error))


def test_a_file_size_limit_counts_as_a_full_disk(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = run(limited, tmp_path / "cache" / "base", log)
    process.join(30)
    assert "was reached; nothing half-written was kept" in log.read_text()
    assert visible(tmp_path / "cache" / "base") == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"must be a folder that can be written.*DYLORA_CACHE"):
        prepare(tmp_path / "file" / "base")


def build_slowly(folder: Path, log: Path) -> None:
    def slow(scratch: Path, result: Path) -> None:
        note(log, "building")
        time.sleep(0.5)
        build(scratch, result)

    prepare(folder, slow, progress=lambda line: note(log, line))
    note(log, "done" if is_complete(folder, "one") else "broken")


def note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [run(build_slowly, tmp_path / "cache" / "base", log) for _ in range(2)]
    for process in processes:
        process.join(30)
    lines = log.read_text().splitlines()
    assert lines.count("building") == 1
    assert lines.count("done") == 2
    assert lines.count("waiting for another process that is preparing base") == 1


def hang(folder: Path, started: Path) -> None:
    def half(scratch: Path, result: Path) -> None:
        build(scratch, result)
        started.touch()
        time.sleep(60)

    prepare(folder, half)


def test_a_killed_builder_leaves_nothing_that_is_taken_for_complete(tmp_path: Path) -> None:
    folder, started = tmp_path / "cache" / "base", tmp_path / "started"
    process = run(hang, folder, started)
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert len(visible(folder)) == 1  # what it had half-written, under another name
    assert not is_complete(folder, "one")
    prepare(folder)
    assert is_complete(folder, "one")
    assert visible(folder) == ["base"]


def test_what_nobody_used_for_long_is_forgotten(tmp_path: Path) -> None:
    day = 86_400
    used, unused, leftover = (tmp_path / name for name in ("used", "unused", ".unused.x.part"))
    for folder in (used, unused):
        prepare(folder)
        os.utime(folder / MANIFEST, (time.time() - 70 * day,) * 2)
    leftover.mkdir()
    prepare(used, lambda scratch, result: pytest.fail("it is complete"))
    forget_unused(tmp_path, days=80)
    assert visible(used) == ["unused", "used"]
    forget_unused(tmp_path, days=60)
    assert visible(used) == ["used"] and is_complete(used, "one")


def test_what_is_being_built_is_not_taken_for_what_a_killed_build_left(tmp_path: Path) -> None:
    def check(scratch: Path, result: Path) -> None:
        forget_unused(tmp_path)
        build(scratch, result)

    assert is_complete(prepare(tmp_path / "base", check), "one")


def test_the_cache_lies_where_the_user_says(tmp_path: Path) -> None:
    home = Path.home()
    assert cache_folder(None, {}) == home / ".cache" / "dylora-moe"
    assert cache_folder(None, {"XDG_CACHE_HOME": "/x"}) == Path("/x/dylora-moe")
    assert cache_folder(None, {"XDG_CACHE_HOME": "/x", "DYLORA_CACHE": "~/y"}) == home / "y"
    assert cache_folder(tmp_path, {"DYLORA_CACHE": "/y"}) == tmp_path
