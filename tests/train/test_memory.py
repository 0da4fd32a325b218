"""Measuring memory: of this process, of a control group, and what is given back to the system."""

from pathlib import Path

import psutil
import pytest
import torch

from dylora_moe.train.memory import _group_rooms, available_memory, peak_memory, resident_memory, restart_peak

CPU = torch.device("cpu")
MEGABYTE = 1 << 20


def test_the_peak_stays_when_memory_is_freed_and_can_be_restarted() -> None:
    if not restart_peak(CPU):
        pytest.skip("this system counts the peak from the start only")
    before = resident_memory()
    block = torch.ones(50 * MEGABYTE)  # 200 MB, above every threshold of an allocator
    assert resident_memory() > before + 190 * MEGABYTE
    del block
    assert peak_memory(CPU) > before + 190 * MEGABYTE
    assert resident_memory() < before + 50 * MEGABYTE
    assert restart_peak(CPU)
    assert peak_memory(CPU) < before + 50 * MEGABYTE


def test_available_is_what_is_free_and_what_is_held() -> None:
    before = available_memory(CPU)
    assert 0 < before <= psutil.virtual_memory().total
    block = torch.ones(50 * MEGABYTE)
    assert available_memory(CPU) == pytest.approx(before, abs=150 * MEGABYTE)  # others take and give, too
    del block


def write_group(folder: Path, limit: str, usage: int, files: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(
        f"anon 5\n{names[2]}active_file {files // 2}\n{names[2]}inactive_file {files // 2}\n"
    )


def test_limits_of_all_groups_around_the_process_count(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job/step\n")
    root = tmp_path / "fs"
    write_group(root / "job", "1000", 600, 100)
    write_group(root / "job" / "step", "max", 600, 100)
    assert list(_group_rooms(membership, root)) == [500]
    write_group(root / "job" / "step", "700", 800, 20)
    assert list(_group_rooms(membership, root)) == [0, 500]


def test_a_containers_group_lies_at_the_top(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/somewhere/on/the/host\n")
    write_group(tmp_path / "fs", "1000", 300, 100)
    assert list(_group_rooms(membership, tmp_path / "fs")) == [800]


def test_groups_of_version_one(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("7:cpu,cpuacct:/a\n4:memory:/a\n")
    write_group(tmp_path / "fs" / "memory" / "a", "1000", 300, 100, version=1)
    assert list(_group_rooms(membership, tmp_path / "fs")) == [800]


def test_no_groups_no_limit(tmp_path: Path) -> None:
    assert list(_group_rooms(tmp_path / "none", tmp_path)) == []
    (tmp_path / "cgroup").write_text("0::/\n")
    assert list(_group_rooms(tmp_path / "cgroup", tmp_path)) == []
