"""What a program may use, and how its run ended."""

from dataclasses import dataclass
from typing import Literal

Ending = Literal["passed", "failed", "cpu time", "wall time", "memory", "processes", "disk", "output", "killed"]
"""`passed` is exit code 0, `failed` any other, `killed` a signal that no limit explains; the others name the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use. The defaults are far above what a solution of MBPP or HumanEval needs."""

    cpu_seconds: float = 10.0
    """Of all processes of the program together, with about 0.1 s for starting Python. Time is judged by these."""
    wall_seconds: float = 60.0
    """Generous, so that a busy machine fails no program: it is for those that wait and do not compute."""
    memory_bytes: int = 1 << 30
    """Of addresses a process, held by the kernel; and of memory in use by all together, looked at now and then."""
    processes: int = 16
    """At once, the program's first one included. Under bubblewrap threads count, too."""
    file_bytes: int = 16 << 20
    """Of one file, and of the folder as a whole."""
    output_bytes: int = 1 << 20
    """Of standard output, and as much of standard error; more ends the run."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    ended: Ending
    exit_code: int | None
    """None where a limit or a signal ended the run."""
    stdout: str
    """At most `output_bytes` of it; what is no UTF-8 is replaced."""
    stderr: str
    cpu_seconds: float | None
    """Of all processes of the program, with the start of Python; None where nobody can tell, which is under Docker."""
    wall_seconds: float
