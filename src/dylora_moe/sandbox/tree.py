"""The processes below one, as /proc tells: what a program uses while it runs. Linux alone; elsewhere there are none."""

import os
from dataclasses import dataclass

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, when it was looked at."""

    pid: int
    parent: int
    cpu_seconds: float
    """Of itself, and of its children that ended and were waited for."""
    memory_bytes: int
    is_dead: bool
    """Ended, and not waited for yet."""


def below(pid: int) -> list[Process]:
    """Every process whose parents lead to `pid`, without `pid` itself."""
    children: dict[int, list[Process]] = {}
    for process in _all():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    parents = [pid]
    while parents:
        next_ones = children.pop(parents.pop(), [])
        found += next_ones
        parents += [process.pid for process in next_ones]
    return found


def _all() -> list[Process]:
    """One file a process: psutil opens several, and this runs ten times a second."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    return [process for name in names if name.isdigit() and (process := _read(int(name)))]


def _read(pid: int) -> Process | None:
    """Source: proc_pid_stat(5). A name may hold blanks and brackets, so fields are counted from its last bracket."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 22:
        return None
    return Process(
        pid=pid,
        parent=int(fields[1]),
        cpu_seconds=sum(map(int, fields[11:15])) / _TICK,
        memory_bytes=int(fields[21]) * _PAGE,
        is_dead=fields[0] in (b"Z", b"X"),
    )
