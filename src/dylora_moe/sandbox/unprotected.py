"""No sandbox: a plain child process with limits, for who asks for it in so many words."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dylora_moe.sandbox.installation import find_installation
from dylora_moe.sandbox.limits import Limits
from dylora_moe.sandbox.sandbox import Sandbox
from dylora_moe.sandbox.watch import Launch, stage_arguments

NAME = "none"


def unprotected() -> Sandbox:
    """The program can read and write what the user can, and reaches the network."""
    installation = find_installation()

    @contextmanager
    def launch(limits: Limits) -> Iterator[Launch]:
        with temporary_folder() as folder:
            arguments = stage_arguments(limits, bind_processes=False)
            yield Launch(command=[installation.executable, *arguments], folder=folder)

    return Sandbox(NAME, launch)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of this run alone; what cannot be removed from it afterwards stays, and stops nothing."""
    with tempfile.TemporaryDirectory(prefix="dylora-sandbox-", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()
