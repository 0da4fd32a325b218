"""What attacks aim at, set up outside the sandbox for their sake: secrets, files, listeners, a process; who watches.

Nothing of the machine itself is aimed at, so that an attack that gets through does no harm.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dylora_moe.sandbox import tree

SECRET_PATTERN = "dylora-secret-[0-9a-f]{32}"
"""Programs look for it without being told the secret."""
VARIABLE = "DYLORA_DOCTOR_SECRET"
_CONTENT = "This file stays as it is."
_LOOK_EVERY = 0.02


@dataclass(slots=True)
class Seen:
    """The most that a program was seen to use at once, by who watches from outside."""

    processes: int = 0
    memory_bytes: int = 0
    file_bytes: int = 0
    """In its folder, and in files that are memory and have no name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What there is to attack."""

    token: str
    """In the name of every file and process that an attack makes."""
    secret: str
    folder: Path
    """Anybody may write in it."""
    secret_files: tuple[Path, ...]
    """The first in the temporary folder, the second in the user's home where that can be written."""
    guarded: Path
    victim: "subprocess.Popen[bytes]"
    """A process of this user that does nothing; the secret is in its environment."""
    port: int
    """Of TCP and UDP on the loopback."""
    socket_path: Path
    callers: list[str] = field(default_factory=list)
    """Who reached a listener."""

    def is_guarded_whole(self) -> bool:
        """Whether the guarded file has the content and the mode that it began with."""
        if not self.guarded.is_file():
            return False
        return self.guarded.read_text() == _CONTENT and self.guarded.stat().st_mode & 0o777 == 0o666

    def is_victim_well(self) -> bool:
        """Whether the process lives, in the order of urgency that it began with, and untraced."""
        if self.victim.poll() is not None or os.getpriority(os.PRIO_PROCESS, self.victim.pid) != os.getpriority(
            os.PRIO_PROCESS, 0
        ):
            return False
        with suppress(OSError):
            return "TracerPid:\t0\n" in Path(f"/proc/{self.victim.pid}/status").read_text()
        return True

    def made_files(self) -> list[Path]:
        """Files with the token in their name, where a program might be able to write."""
        folders = [self.folder, Path(tempfile.gettempdir()), Path.home(), Path("/var/tmp"), Path("/dev/shm")]
        return [path for folder in [*folders, Path(os.__file__).parent] for path in _listed(folder, self.token)]

    def made_processes(self) -> list[int]:
        """Processes with the token in their command line, this one and the victim left out."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")) if os.path.isdir("/proc") else ():
            with suppress(OSError):
                if self.token.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
        return [pid for pid in found if pid not in (os.getpid(), self.victim.pid)]

    def clear(self) -> None:
        """Removes what attacks made that got through."""
        for pid in self.made_processes():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for path in self.made_files():
            if path not in (self.folder, *self.secret_files) and not path.is_dir():
                path.unlink(missing_ok=True)


@contextmanager
def set_scene() -> Iterator[Scene]:
    """Everything in place; removed afterwards."""
    token, secret = f"dylora-doctor-{secrets.token_hex(8)}", f"dylora-secret-{secrets.token_hex(16)}"
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="dylora-scene-")).resolve()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o777)
        secret_files = _secret_files(folder, token, secret, stack)
        guarded = folder / "guarded.txt"
        guarded.write_text(_CONTENT)
        guarded.chmod(0o666)
        victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time; time.sleep(3600)"], env={VARIABLE: secret}
        )
        stack.callback(_end, victim)
        os.environ[VARIABLE] = secret
        stack.callback(os.environ.pop, VARIABLE, None)
        callers: list[str] = []
        port, socket_path = _listen(folder, callers, stack)
        scene = Scene(
            token=token,
            secret=secret,
            folder=folder,
            secret_files=secret_files,
            guarded=guarded,
            victim=victim,
            port=port,
            socket_path=socket_path,
            callers=callers,
        )
        stack.callback(scene.clear)
        yield scene


@contextmanager
def watching() -> Iterator[Seen]:
    """Watches what starts below this process; nothing is seen of what a daemon runs."""
    seen, over = Seen(), threading.Event()
    before = {process.pid for process in tree.below(os.getpid())}

    def watch() -> None:
        while not over.wait(_LOOK_EVERY):
            now = [each for each in tree.below(os.getpid()) if each.pid not in before and not each.is_dead]
            seen.processes = max(seen.processes, len(now))
            seen.memory_bytes = max(seen.memory_bytes, sum(each.memory_bytes for each in now))
            seen.file_bytes = max(seen.file_bytes, _held([each.pid for each in now]))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def _secret_files(folder: Path, token: str, secret: str, stack: ExitStack) -> tuple[Path, ...]:
    planted = [folder / "secret.txt", Path.home() / f".{token}.txt"]
    written = []
    for path in planted:
        with suppress(OSError):
            path.write_text(secret)
            written.append(path)
            stack.callback(path.unlink, missing_ok=True)
    return tuple(written)


def _listen(folder: Path, callers: list[str], stack: ExitStack) -> tuple[int, Path]:
    """Listeners on the loopback, TCP and UDP on one port, and on a path; each notes who calls."""
    stream = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    stream.bind(("127.0.0.1", 0))
    port = stream.getsockname()[1]
    packets = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    packets.bind(("127.0.0.1", port))
    local = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    path = folder / "listener"
    local.bind(str(path))
    path.chmod(0o777)
    over = threading.Event()

    def answer(name: str, listener: socket.socket) -> None:
        while not over.is_set():
            with suppress(OSError):
                if name == "UDP":
                    listener.recv(1)
                else:
                    listener.accept()[0].close()
                callers.append(name)

    threads = []
    for name, listener in (("TCP", stream), ("UDP", packets), ("a socket file", local)):
        listener.settimeout(0.1)
        if name != "UDP":
            listener.listen()
        threads.append(threading.Thread(target=answer, args=(name, listener), daemon=True))
        threads[-1].start()

    def end() -> None:
        over.set()
        for thread in threads:
            thread.join()

    stack.callback(end)
    return port, path


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _held(pids: list[int]) -> int:
    """Bytes in the folder of a program, and in files without a name that it holds open."""
    folder = 0
    nameless: dict[tuple[int, int], int] = {}
    for pid in pids:
        where = f"/proc/{pid}/cwd/"
        if os.path.isfile(f"{where}main.py"):
            folder = max(folder, sum(_size(f"{where}{name}") for name in _names(where)))
        for name in _names(f"/proc/{pid}/fd"):
            with suppress(OSError):
                link = f"/proc/{pid}/fd/{name}"
                if os.readlink(link).startswith("/memfd:"):
                    found = os.stat(link)
                    nameless[found.st_dev, found.st_ino] = found.st_blocks * 512
    return folder + sum(nameless.values())


def _size(path: str) -> int:
    with suppress(OSError):
        return os.lstat(path).st_blocks * 512
    return 0


def _names(folder: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(folder)
    return []


def _listed(folder: Path, token: str) -> list[Path]:
    return [folder / name for name in _names(str(folder)) if token in name]
