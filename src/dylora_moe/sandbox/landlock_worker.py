"""The process between us and sandlock: gives up root's rights, runs the stage in it, ends what is left behind.

A process of its own, since sandlock forks and answers the kernel's questions in threads, which a process that trains
must not do; and since what a program leaves behind becomes its child, so that it can end it.

Arguments: the folder that sandlock is installed in; sandlock's settings and the stage's command, as JSON; a file
descriptor to write the program's processor seconds to; one that ends when our process does.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress

_SET_CHILD_SUBREAPER, _DROP_BOUNDING_CAPABILITY, _LAST_CAPABILITY = 36, 24, 63
_CAPABILITIES_VERSION_3 = 0x20080522


def main() -> None:
    """Exits with the program's code, or 128 and the signal's number, or 125 where sandlock did not start it."""
    sys.path.insert(0, sys.argv[1])
    from sandlock import Sandbox, StdioMode, landlock_abi_version, min_landlock_abi

    if landlock_abi_version() < min_landlock_abi():
        sys.exit(f"Linux 6.12 is needed, with Landlock: version {min_landlock_abi()}, got {landlock_abi_version()}")
    settings, command = json.loads(sys.argv[2])
    report, alive = int(sys.argv[3]), int(sys.argv[4])
    os.set_inheritable(report, False)
    os.set_inheritable(alive, False)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    if os.geteuid() == 0:
        _give_up_rights(libc)
    leaving = threading.Lock()
    threading.Thread(target=_end_with, args=(alive, settings["cwd"], leaving), daemon=True).start()
    process = Sandbox(**settings).popen(command, StdioMode.INHERIT, StdioMode.INHERIT, StdioMode.INHERIT)
    result = process.wait()
    leaving.acquire()  # for good: one of the two threads ends this process
    _end_children()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.write(report, f"{usage.ru_utime + usage.ru_stime:.3f}".encode())
    if result.error:
        print(result.error, file=sys.stderr)
        os._exit(125)
    os._exit(128 + max(result.signal, 0) if result.exit_code < 0 else result.exit_code)


def _give_up_rights(libc: ctypes.CDLL) -> None:
    """Of root only the name stays: its files can be read, such as Python in its home, but nothing passes their modes.

    With its rights, a program could make the device of a disk in its folder and read all of it.
    """
    for capability in range(_LAST_CAPABILITY + 1):
        libc.prctl(_DROP_BOUNDING_CAPABILITY, capability, 0, 0, 0)  # fails for those that this kernel lacks
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def _end_with(alive: int, folder: str, leaving: threading.Lock) -> None:
    """Ends everything once our process is gone, and removes the folder that it no longer can."""
    os.read(alive, 1)
    leaving.acquire()
    while _kill_children():  # of one that dies, the children come here
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(125)


def _end_children() -> None:
    """Ends what the program left behind, and what that starts meanwhile, until nothing is there."""
    with suppress(ChildProcessError):
        while True:
            _kill_children()
            os.waitpid(-1, 0)


def _kill_children() -> int:
    """How many were alive."""
    killed = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            if int(parent) == os.getpid() and state not in (b"Z", b"X"):
                os.kill(int(name), signal.SIGKILL)
                killed += 1
    return killed


if __name__ == "__main__":
    main()
