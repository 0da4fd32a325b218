"""The sandbox by bubblewrap: namespaces in which nothing of the host is there but Python.

The folder is memory, of a fixed size. As root, bwrap needs no user namespace, and the program becomes a user of its
own, since the kernel's limit of processes does not bind root; else the user namespace counts its processes for itself.
"""

import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dylora_moe.errors import SandboxError
from dylora_moe.sandbox.installation import Installation, find_installation
from dylora_moe.sandbox.limits import Limits
from dylora_moe.sandbox.sandbox import Sandbox
from dylora_moe.sandbox.seccomp import build_filter, is_known
from dylora_moe.sandbox.watch import Launch, stage_arguments

NAME = "bubblewrap"
_FOLDER = "/tmp"
_SHARED_BYTES = 1 << 20
# Users that exist nowhere: of the 32 bits of the first namespace, or above those that Debian gives out.
_FIRST_USER, _USERS = 1_700_000_000, 1 << 24
_FIRST_OF_FEW, _FEW_USERS = 60_600, 4_000


def bubblewrap() -> Sandbox:
    """The sandbox, which may still not work here: the first program shows it.

    Raises:
        SandboxError: It is not installed, or its filter of calls does not know this kind of processor.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError("bubblewrap must be installed: `apt-get install bubblewrap`, or your system's like of it.")
    if not is_known():
        raise SandboxError(f"bubblewrap is used on x86_64 and aarch64, this is {platform.machine()}.")
    program, installation = os.path.abspath(found), find_installation()

    @contextmanager
    def launch(limits: Limits) -> Iterator[Launch]:
        rules, writer = os.pipe()
        try:
            os.write(writer, build_filter(on_the_host=False))
            os.close(writer)
            is_root = os.geteuid() == 0
            command = [
                program,
                *_walls(is_root),
                *_files(installation, limits),
                *("--seccomp", str(rules), "--", installation.executable),
                *stage_arguments(
                    limits, bind_processes=is_root or _counts_by_namespace(), user=_own_user() if is_root else 0
                ),
            ]
            yield Launch(command=command, pass_fds=[rules])
        finally:
            os.close(rules)

    return Sandbox(NAME, launch)


def _walls(is_root: bool) -> list[str]:
    """Namespaces and rights. The stage alone keeps the right to become another user, and gives it up with it."""
    own_user = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    return [
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *(() if is_root else ("--unshare-user",)),
        *("--die-with-parent", "--new-session", "--as-pid-1", "--clearenv", "--hostname", "sandbox"),
        *("--cap-drop", "ALL"),
        *(own_user if is_root else ()),
    ]


def _files(installation: Installation, limits: Limits) -> list[str]:
    """Python read only, an empty folder in memory, and nothing else that could be written."""
    arguments: list[str] = []
    for parent in _parents(installation.readable):  # bwrap itself makes them for root alone
        arguments += ["--perms", "0755", "--dir", parent]
    for path in installation.readable:
        arguments += ["--ro-bind", path, path]
    for path in installation.hidden:
        arguments += ["--tmpfs", path, "--remount-ro", path]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    arguments += ["--perms", "1777", "--size", str(_SHARED_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    arguments += ["--perms", "0777", "--size", str(limits.file_bytes), "--tmpfs", _FOLDER, "--chdir", _FOLDER]
    return [*arguments, "--remount-ro", "/"]


def _parents(paths: Sequence[str]) -> list[str]:
    found = {str(parent) for path in paths for parent in Path(path).parents}
    return sorted(found - {"/"} - set(paths))


def _own_user() -> int:
    """A number that hardly any other run has: the kernel counts processes by it."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").split("\n")
    is_whole = any(line.split()[0] == "0" and int(line.split()[2]) > _FIRST_USER + _USERS for line in lines if line)
    first, count = (_FIRST_USER, _USERS) if is_whole else (_FIRST_OF_FEW, _FEW_USERS)
    return first + secrets.randbelow(count)


def _counts_by_namespace() -> bool:
    """Since Linux 5.14 a user namespace's processes are counted apart from the user's others."""
    version = platform.release().split(".")
    try:
        return (int(version[0]), int(version[1].split("-")[0])) >= (5, 14)
    except (IndexError, ValueError):
        return False
