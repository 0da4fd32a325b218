"""A sandbox: a back end's name, and how it runs the stage."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from dylora_moe.sandbox.limits import Limits, Outcome
from dylora_moe.sandbox.watch import Launch, run_watched

_DEFAULT = Limits()


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Runs Python programs that nobody has read. Several may run at once, in threads."""

    name: str
    """`bubblewrap`, `sandlock`, `docker` or `none`: results record it."""
    launch: Callable[[Limits], AbstractContextManager[Launch]] = field(repr=False)

    def run(self, program: str, limits: Limits = _DEFAULT) -> Outcome:
        """Runs the text of a program by `python -I main.py`, in a folder of its own that is removed afterwards.

        It has the standard library, an empty standard input and an empty environment.

        Raises:
            SandboxError: The sandbox failed before the program began.
        """
        with self.launch(limits) as launch:
            return run_watched(launch, program, limits)
