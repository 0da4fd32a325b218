"""The sandbox by Docker, for who asks for it: needs a daemon, and an image that was pulled before."""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dylora_moe.errors import SandboxError
from dylora_moe.sandbox.limits import Limits
from dylora_moe.sandbox.sandbox import Sandbox
from dylora_moe.sandbox.watch import Launch, stage_arguments

NAME = "docker"
_NOBODY = "65534:65534"
_ANSWER_SECONDS = 20.0


def image() -> str:
    """The image that programs run in: the Python that runs this, on Debian."""
    return f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"


def docker() -> Sandbox:
    """The sandbox, which may still not work here: the first program shows it.

    Raises:
        SandboxError: There is no client, no daemon, or no image.
    """
    client = shutil.which("docker")
    if client is None:
        raise SandboxError("Docker must be installed, with a daemon that this user may use.")
    _ask(client, ["version", "--format", "{{.Server.Version}}"], "Docker's daemon must answer")
    _ask(client, ["image", "inspect", "--format", "{{.Id}}", image()], f"`docker pull {image()}` must have been run")

    @contextmanager
    def launch(limits: Limits) -> Iterator[Launch]:
        name = f"dylora-sandbox-{secrets.token_hex(8)}"
        yield Launch(
            command=[client, *run_arguments(name, limits)],
            environment=_environment(),
            stop=[client, "kill", name],
        )

    return Sandbox(NAME, launch)


def run_arguments(name: str, limits: Limits) -> list[str]:
    """What follows `docker`, to run the stage in a container of that name."""
    memory = str(limits.memory_bytes)
    return [
        *("run", "--rm", "--interactive", "--name", name, "--pull", "never", "--log-driver", "none"),
        *("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--user", _NOBODY, "--hostname", "sandbox", "--ulimit", "core=0"),
        *("--pids-limit", str(limits.processes + 1), "--memory", memory, "--memory-swap", memory),
        *("--tmpfs", f"/work:rw,nosuid,nodev,size={limits.file_bytes},mode=1777", "--workdir", "/work"),
        *(image(), "python", *stage_arguments(limits, bind_processes=False)),
    ]


def _ask(client: str, arguments: list[str], what: str) -> None:
    try:
        answer = subprocess.run(
            [client, *arguments],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SandboxError(f"{what}; `docker {arguments[0]}` did not within {_ANSWER_SECONDS:.0f} s.") from None
    if answer.returncode:
        raise SandboxError(f"{what}: {(answer.stderr or answer.stdout).strip()}")


def _environment() -> Mapping[str, str]:
    """What the client needs to find its daemon; nothing of it reaches the container."""
    return {name: value for name, value in os.environ.items() if name in ("HOME", "PATH") or name.startswith("DOCKER_")}
