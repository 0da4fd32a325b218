"""Memory of this process and this machine, in bytes: what is held, what was held at most, what can be had."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

_PROCESS = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")
# Limit, usage, and the word for file pages in memory.stat: version 2, then version 1, whose files lie one folder below.
_CGROUP_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)

_M_MMAP_THRESHOLD = -3  # malloc.h
# Activations of a few hundred tokens are larger, and the many small blocks of Python and autograd are not.
_SEPARATE_BYTES = 256 * 2**10


def keeps_freed_memory(device: torch.device) -> bool:
    """True where tensors come from an allocator that keeps freed memory and can be told not to: glibc's, on a CPU."""
    return device.type == "cpu" and _mallopt() is not None


def _mallopt() -> Any:
    # musl has none, and macOS and Windows have allocators of their own.
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None


def return_freed_memory() -> None:
    """From now on, give every large tensor that is freed back to the system, where `keeps_freed_memory`.

    glibc keeps freed blocks for later ones, but torch asks for aligned blocks, and those find no place in a freed
    block of their own size (https://sourceware.org/bugzilla/show_bug.cgi?id=14581): resident memory was up to twice
    what tensors took, and grew from step to step. A mapping of its own for each large block ends that; the system
    then clears every block anew, which makes a step a third longer (docs/log.md has figures of both).
    """
    if (mallopt := _mallopt()) is not None:
        mallopt(_M_MMAP_THRESHOLD, _SEPARATE_BYTES)


def resident_memory() -> int:
    """What this process holds of the machine's memory now."""
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """The most that was held at once, since `restart_peak` or else since the start.

    On a GPU what tensors took (`max_memory_allocated`); else resident memory, with everything that a process has
    besides tensors.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := _PROCESS / "status").is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak(device: torch.device) -> bool:
    """Let `peak_memory` count from now on; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def available_memory(device: torch.device) -> int:
    """What this process could hold at most, with what it holds already, before something must give way.

    On a GPU what is free there and what torch has reserved; else the machine's memory, or what is left of the limit
    of the control groups (containers, jobs of a scheduler) that the process is in. File pages count as free: the
    system drops them first.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    held = psutil.Process().memory_info()
    own = held.rss - getattr(held, "shared", 0)
    return own + min([psutil.virtual_memory().available, *_group_rooms(_PROCESS / "cgroup", _CGROUPS)])


def _group_rooms(membership: Path, root: Path) -> Iterator[int]:
    """Bytes left in each control group with a limit that the process is in, its own and those around it."""
    if not membership.is_file():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        folder = top / path.lstrip("/")
        # In a container the path may be the host's, and the group's own files lie at the top.
        for group in [folder, *folder.parents] if folder.is_dir() else [top]:
            if (room := _room(group)) is not None:
                yield room
            if group == top:
                break


def _room(group: Path) -> int | None:
    for limit_name, usage_name, words in _CGROUP_FILES:
        try:
            limit = (group / limit_name).read_text(encoding="ascii").strip()
            usage = int((group / usage_name).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdecimal():  # else "max"
            return max(0, int(limit) - usage + sum(int(stat.get(word, 0)) for word in words))
    return None
