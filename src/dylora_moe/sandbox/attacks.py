"""Known attacks on who runs a program: what each tries, what must hold, and how that is seen from outside.

They are mild, so that one that gets through does no harm: bombs of a few hundred processes, a few hundred megabytes,
and nothing aimed at but what the scene put there.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dylora_moe.sandbox.limits import Ending, Limits, Outcome
from dylora_moe.sandbox.scene import Scene, Seen

_MEGABYTE = 1 << 20
# What starts the program takes a few processes, and some memory of its own.
_MORE_PROCESSES, _MORE_MEMORY = 3, 96 * _MEGABYTE
_LIMITS = Limits(
    cpu_seconds=10,
    wall_seconds=20,
    memory_bytes=256 * _MEGABYTE,
    processes=16,
    file_bytes=8 * _MEGABYTE,
    output_bytes=1 << 16,
)
_SHORT = Limits(cpu_seconds=1, wall_seconds=20, memory_bytes=256 * _MEGABYTE)
_SLEEPY = Limits(cpu_seconds=10, wall_seconds=2, memory_bytes=256 * _MEGABYTE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A program that wants something, and what shows that it did not get it."""

    name: str
    must_hold: str
    program: str
    """It finds the scene's values in variables: `token`, `pattern`, `folder`, `secret_files`, `guarded`, `victim`,
    `parent`, `port`, `socket_path`, `own_source`."""
    limits: Limits
    got: Callable[[Scene, Outcome, Seen], str]
    """What it got, in words; nothing where it was stopped."""


def _unless(*endings: Ending) -> Callable[[Scene, Outcome, Seen], str]:
    return lambda scene, outcome, seen: "" if outcome.ended in endings else f"it ended as: {outcome.ended}"


def _processes(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    most = _LIMITS.processes + _MORE_PROCESSES
    return f"{seen.processes} processes at once" if seen.processes > most else _said(scene, outcome, seen)


def _memory(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    if seen.memory_bytes > _LIMITS.memory_bytes + _MORE_MEMORY:
        return f"{seen.memory_bytes // _MEGABYTE} MB of memory"
    return _said(scene, outcome, seen)


def _files(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    # A folder on the host is looked at ten times a second, and may pass its limit until then.
    if seen.file_bytes > 4 * _LIMITS.file_bytes:
        return f"{seen.file_bytes // _MEGABYTE} MB of files"
    return _said(scene, outcome, seen)


def _secrets(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    return "the secret" if scene.secret in outcome.stdout + outcome.stderr else _said(scene, outcome, seen)


def _said(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    """What a program says that it got, by lines that begin with `got`."""
    said = (line[4:] for line in outcome.stdout.split("\n") if line.startswith("got "))
    return "; ".join(dict.fromkeys(said))


def _connections(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    return "; ".join(f"a connection by {name}" for name in dict.fromkeys(scene.callers))


def _harm(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    return _said(scene, outcome, seen) if scene.is_victim_well() else "another process, killed, slowed or traced"


def _writes(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    if not scene.is_guarded_whole():
        return "a file changed"
    return "a file made" if [path for path in scene.made_files() if path not in scene.secret_files] else ""


def _survivors(scene: Scene, outcome: Outcome, seen: Seen) -> str:
    if "left behind" not in outcome.stdout:
        return f"it did not start what it wanted to leave: {outcome.stderr[-200:]}"
    return "a process that outlives it" if scene.made_processes() else ""


_FORK_BOMB = """
import os, time
for _ in range(8):
    try:
        os.fork()
    except OSError:
        pass
time.sleep(1.5)
"""

_MEMORY = """
parts = []
for _ in range(48):
    parts.append(bytearray(b"x") * (16 << 20))
print("got 768 MB of memory")
"""

_MEMORY_OF_MANY = """
import os, time
def grow():
    parts = []
    for _ in range(16):
        parts.append(bytearray(b"x") * (8 << 20))
        time.sleep(0.1)
    time.sleep(1)
    os._exit(0)
children = []
for _ in range(6):
    if not (child := os.fork()):
        grow()
    children.append(child)
if all(os.waitpid(child, 0)[1] == 0 for child in children):
    print("got 768 MB of memory in six processes")
"""

_NAMELESS_FILES = """
import os
held = 0
for number in range(32):
    file = os.memfd_create(f"part{number}")
    for _ in range(8):
        held += os.write(file, b"x" * (1 << 20))
print("got", held >> 20, "MB in files that are memory")
"""

_ONE_FILE = """
import time
with open("large", "wb", buffering=0) as file:
    for _ in range(64):
        file.write(b"x" * (1 << 20))
        time.sleep(0.02)
print("got 64 MB in a file")
"""

_MANY_FILES = """
import time
for number in range(64):
    with open(f"part{number}", "wb") as file:
        file.write(b"x" * (1 << 20))
    time.sleep(0.05)
print("got 64 MB in many files")
"""

_DELETED_FILES = """
import os, time
files = []
for number in range(64):
    files.append(open("part", "wb"))
    os.unlink("part")
    files[-1].write(b"x" * (1 << 20))
    files[-1].flush()
    time.sleep(0.05)
print("got 64 MB in files without a name")
"""

_FILES_ELSEWHERE = """
import os
held = 0
places = ("/", "/dev", "/dev/shm", "/etc", "/proc", "/run", "/tmp", "/usr", "/var/tmp", os.path.dirname(os.__file__))
for where in places:
    made = []
    try:
        for number in range(16):
            made.append(os.path.join(where, f"{token}-{number}"))
            with open(made[-1], "wb", buffering=0) as file:
                held += file.write(b"x" * (1 << 20))
    except OSError:
        pass
    if where != os.getcwd():
        for path in made:
            if os.path.exists(path):
                os.unlink(path)
if held > 12 << 20:
    print("got", held >> 20, "MB in files elsewhere")
"""

_READ_FILES = """
import os
for path in [*secret_files, own_source, "/etc/shadow"]:
    try:
        with open(path) as file:
            text = file.read()
        print("got" if path not in secret_files else "read", path, len(text))
        if path in secret_files:
            print(text)
    except OSError:
        pass
for path in secret_files:
    try:
        os.symlink(path, "link")
        print(open("link").read())
    except OSError:
        pass
    try:
        os.link(path, "hard")
        print(open("hard").read())
    except OSError:
        pass
"""

_READ_ENVIRONMENT = """
import os, re
texts = [repr(dict(os.environ)).encode()]
names = ["self", "1", str(parent), str(victim)]
try:
    names += filter(str.isdigit, os.listdir("/proc"))
except OSError:
    pass
for name in names:
    try:
        with open(f"/proc/{name}/environ", "rb") as file:
            texts.append(file.read())
    except OSError:
        pass
print(re.findall(pattern, b"".join(texts).decode("utf-8", "replace")))
"""

_CALL_HOME = """
import socket
def attempt(call):
    try:
        call()
    except OSError:
        pass
def tcp():
    socket.create_connection(("127.0.0.1", port), timeout=2)
def udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port))
def path():
    socket.socket(socket.AF_UNIX).connect(socket_path)
for call in (tcp, udp, path):
    attempt(call)
"""

_CALL_OUT = """
import socket
for host in ("1.1.1.1", "8.8.8.8"):
    try:
        socket.create_connection((host, 53), timeout=2)
        print("got a connection to", host)
    except OSError:
        pass
"""

_KILL = """
import os, signal
def attempt(call):
    try:
        call()
    except (OSError, AttributeError):
        pass
def limit():
    import resource
    resource.prlimit(victim, resource.RLIMIT_NOFILE, (3, 3))
    print("got hold of another process's limits")
def look():
    os.kill(parent, 0)
    print("got at the process that evaluates")
attempt(limit)
attempt(look)
attempt(lambda: os.setpriority(os.PRIO_PROCESS, victim, 19))
attempt(lambda: signal.pidfd_send_signal(os.pidfd_open(victim), signal.SIGKILL))
attempt(lambda: os.kill(victim, signal.SIGKILL))
"""

_TRACE = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(16, victim, None, None) == 0:
    print("got to trace a process")
    time.sleep(0.5)
buffer = ctypes.create_string_buffer(16)
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
for pid in (victim, parent):
    for name in ("environ", "maps", "mem"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                file.read(1)
            print(f"got to read a process's {name}")
        except OSError:
            pass
"""

_WRITE = """
import os, tempfile
name = token + ".txt"
home = os.path.dirname(secret_files[-1])
for where in (folder, os.path.dirname(folder), home, "/var/tmp", "/dev/shm", os.path.dirname(os.__file__), "/"):
    for attempt in (
        lambda: open(os.path.join(where, name), "w").close(),
        lambda: os.mkfifo(os.path.join(where, name)),
        lambda: os.symlink("x", os.path.join(where, name)),
    ):
        try:
            attempt()
        except OSError:
            pass
for attempt in (
    lambda: open(guarded, "w").write("changed"),
    lambda: os.truncate(guarded, 0),
    lambda: os.chmod(guarded, 0o600),
    lambda: os.rename(guarded, guarded + token),
    lambda: os.unlink(guarded),
):
    try:
        attempt()
    except OSError:
        pass
"""

_OUTPUT = """
import sys
for _ in range(200_000):
    sys.stdout.write("x" * 1000)
"""

_SLEEP = """
import time
time.sleep(60)
"""

_BUSY = """
while True:
    pass
"""

_BUSY_MANY = """
import os
for _ in range(3):
    os.fork()
while True:
    pass
"""

_LEAVE_BEHIND = """
import os, signal, sys, time
ready, tell = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for file in (0, 1, 2):
            os.close(file)
        os.write(tell, b"x")
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(30)", token])
    os._exit(0)
os.read(ready, 1)
time.sleep(0.3)
print("left behind")
"""


def _attack(
    name: str,
    must_hold: str,
    program: str,
    got: Callable[[Scene, Outcome, Seen], str],
    limits: Limits = _LIMITS,
) -> Attack:
    return Attack(name=name, must_hold=must_hold, program=program, limits=limits, got=got)


ATTACKS = (
    _attack("fork bomb", "no more processes at once than the limit", _FORK_BOMB, _processes),
    _attack("memory", "no more memory than the limit", _MEMORY, _memory),
    _attack("memory of many", "the run ends once all processes pass the limit", _MEMORY_OF_MANY, _unless("memory")),
    _attack("nameless files", "no memory that no limit counts", _NAMELESS_FILES, _files),
    _attack("one large file", "no file above the limit", _ONE_FILE, _files),
    _attack("many files", "no folder above the limit, but for a moment", _MANY_FILES, _files),
    _attack("deleted files", "no more in files without a name, either", _DELETED_FILES, _files),
    _attack("files elsewhere", "no folder without a limit", _FILES_ELSEWHERE, _said),
    _attack("read secret files", "no file of the home, the project or the system is read", _READ_FILES, _secrets),
    _attack("read environments", "no variable of this or another process is seen", _READ_ENVIRONMENT, _secrets),
    _attack("reach this machine", "no listener of this machine is called", _CALL_HOME, _connections),
    _attack("reach the network", "no connection to the outside", _CALL_OUT, _said),
    _attack("kill a process", "no process outside is signalled or slowed", _KILL, _harm),
    _attack("trace a process", "no process outside is traced or read", _TRACE, _harm),
    _attack("write outside", "no file outside its folder is made or changed", _WRITE, _writes),
    _attack("endless output", "the run ends at the limit", _OUTPUT, _unless("output")),
    _attack("sleep", "the run ends at the limit of wall time", _SLEEP, _unless("wall time"), _SLEEPY),
    _attack("busy loop", "the run ends at the limit of processor time", _BUSY, _unless("cpu time"), _SHORT),
    _attack("busy processes", "their processor time is added up", _BUSY_MANY, _unless("cpu time"), _SHORT),
    _attack("stay behind", "nothing of the program outlives the run", _LEAVE_BEHIND, _survivors),
)
"""Each is tried by `dylora doctor sandbox`."""
