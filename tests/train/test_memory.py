"""Measuring memory: of this process, of a control group, and what is given back to the system."""

import subprocess
import sys
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
    block = torch.ones(50 * MEGABYTE)
    assert resident_memory() > 190 * MEGABYTE
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    assert 190 * MEGABYTE < available_memory(CPU) < total
    assert available_memory(CPU) < free + resident_memory() + 1000 * MEGABYTE  # others take and give, too
    del block


HOLES = """
import sys, torch
from dylora_moe.train.memory import keeps_freed_memory, resident_memory, return_freed_memory
if not keeps_freed_memory(torch.device("cpu")):
    sys.exit(3)
if sys.argv[1] == "given back":
    return_freed_memory()
block = torch.empty(1 << 22); del block  # glibc's own threshold rises, as it does in any run
blocks = [torch.ones(1 << 18) for _ in range(200)]
full = resident_memory()
del blocks[::2]
print(full - resident_memory())
"""


def test_freed_memory_is_given_back_from_between_what_is_held() -> None:
    def freed(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("not glibc")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert freed("given back") > 95 * MEGABYTE
    assert freed("kept") < 20 * MEGABYTE  # else there would be no need of it


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
