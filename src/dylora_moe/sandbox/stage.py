"""The first process inside every sandbox: takes the program from its standard input, sets limits, runs it, outlives it.

It is run as text (`python -I -S -c`), on whatever Python is there: it imports nothing of this package. Where it is the
first process of a namespace, all others die with it.

Arguments: seconds of processor, bytes of addresses, processes (0: no limit), bytes a file, user to become (0: stay),
a seccomp filter in hexadecimal digits, or nothing. It exits with the program's code, or 128 and the signal's number.
"""

import os
import resource
import sys

STARTED = b"\0the program starts\n"
"""On standard error before anything of the program: without it, what failed is the sandbox."""

_OPEN_FILES = 128


def main() -> None:
    """Runs the program in a child, and waits for it and for whatever it leaves behind until then."""
    program = b""
    while part := os.read(0, 1 << 16):
        program += part
    child = os.fork()
    if not child:
        try:
            _run(program)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(125)
    while True:
        ended, status = os.wait()
        if ended == child:
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _run(program: bytes) -> None:
    seconds, memory, processes, file_bytes, user = map(int, sys.argv[1:6])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    with open("main.py", "wb") as file:
        file.write(program)
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        _lower(resource.RLIMIT_MSGQUEUE, 0)
        _lower(resource.RLIMIT_AS, memory)
        if processes:
            _lower(resource.RLIMIT_NPROC, processes)
    _lower(resource.RLIMIT_CPU, seconds, seconds + 1)
    if sys.argv[6]:
        _filter(bytes.fromhex(sys.argv[6]))
    os.write(2, STARTED)
    os.execve(sys.executable, [sys.executable, "-I", "main.py"], {})


def _lower(kind: int, soft: int, hard: int | None = None) -> None:
    """Sets a limit for good, never above the one at hand."""
    most = resource.getrlimit(kind)[1]
    wanted = [soft, soft if hard is None else hard]
    if most != resource.RLIM_INFINITY:
        wanted = [min(limit, most) for limit in wanted]
    resource.setrlimit(kind, (wanted[0], wanted[1]))


def _filter(rules: bytes) -> None:
    """A seccomp filter for this process and all that it starts. Source: seccomp(2)."""
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_char_p)]

    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(rules) // 8, rules)
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, mode_filter, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    main()
