"""Docker's question whether a container is well: asks the server that runs here; without one there is nothing to ask.

Usage: python healthcheck.py. Exit code 0 when it answers, or when the container does not serve.
"""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

_SECONDS = 4


def port_of(command: list[str]) -> int | None:
    """The port that `dylora serve` listens on; None for any other command."""
    if "serve" not in command:
        return None
    for flag, value in zip(command, [*command[1:], ""], strict=True):
        if flag == "--port":
            return int(value)
        if flag.startswith("--port="):
            return int(flag.partition("=")[2])
    return 8000


def is_well(port: int) -> bool:
    """Whether the server takes requests."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=_SECONDS) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def main(process: str = "1") -> int:
    """The exit code; the container's own command is that of its first process."""
    command = Path("/proc", process, "cmdline").read_bytes().decode(errors="replace").split("\0")
    port = port_of(command)
    return 0 if port is None or is_well(port) else 1


if __name__ == "__main__":
    sys.exit(main(os.environ.get("DYLORA_PROCESS", "1")))
