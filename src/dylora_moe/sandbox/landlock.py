"""The sandbox by Landlock and seccomp, through the package sandlock: needs no installation, no namespace, no root.

The kernel checks what is opened, so names and sizes of other files can still be asked for. The program's user stays
ours; as root, without root's rights.
"""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dylora_moe.errors import SandboxError
from dylora_moe.sandbox import landlock_worker
from dylora_moe.sandbox.installation import Installation, find_installation
from dylora_moe.sandbox.limits import Limits
from dylora_moe.sandbox.sandbox import Sandbox
from dylora_moe.sandbox.seccomp import build_filter, is_known
from dylora_moe.sandbox.unprotected import temporary_folder
from dylora_moe.sandbox.watch import Launch, stage_arguments

NAME = "sandlock"


def landlock() -> Sandbox:
    """The sandbox, which may still not work here: the first program shows it.

    Raises:
        SandboxError: sandlock is not installed, or its filter of calls does not know this kind of processor.
    """
    spec = find_spec("sandlock")
    if spec is None or spec.origin is None:
        raise SandboxError("sandlock must be installed: `pip install 'dylora-moe[sandbox]'`.")
    if not is_known():
        raise SandboxError(f"sandlock is used on x86_64 and aarch64, this is {platform.machine()}.")
    package, installation = str(Path(spec.origin).parents[1]), find_installation()

    @contextmanager
    def launch(limits: Limits) -> Iterator[Launch]:
        report, reports = os.pipe()
        alive, lives = os.pipe()
        try:
            with temporary_folder() as folder:
                rules = build_filter(on_the_host=True)
                stage = [installation.executable, *stage_arguments(limits, bind_processes=False, rules=rules)]
                task = json.dumps([_settings(installation, folder, limits), stage])
                yield Launch(
                    command=[
                        *(sys.executable, "-I", "-S", landlock_worker.__file__),
                        *(package, task, str(reports), str(alive)),
                    ],
                    folder=folder,
                    environment={"HOME": "/"},  # sandlock asks for one, and does not use it
                    pass_fds=[reports, alive],
                    report=report,
                )
        finally:
            for end in (report, reports, alive, lives):
                os.close(end)

    return Sandbox(NAME, launch)


def _settings(installation: Installation, folder: Path, limits: Limits) -> dict[str, Any]:
    """Of sandlock 0.9. What it does not name is refused: the network, and all other files."""
    return {
        "fs_readable": [*installation.readable, "/dev/urandom", "/dev/zero"],
        "fs_writable": [str(folder), "/dev/null"],
        "fs_denied": list(installation.hidden),
        "cwd": str(folder),
        "clean_env": True,
        "max_processes": limits.processes + 1,  # the stage is one
    }
