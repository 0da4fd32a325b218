"""A wish -> the sandbox that serves it on this machine, tried out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dylora_moe.errors import SandboxError
from dylora_moe.sandbox import bubblewrap, docker, landlock, unprotected
from dylora_moe.sandbox.limits import Limits
from dylora_moe.sandbox.sandbox import Sandbox

# In the order in which they are tried.
_BY_ITSELF: Mapping[str, Callable[[], Sandbox]] = {
    bubblewrap.NAME: bubblewrap.bubblewrap,
    landlock.NAME: landlock.landlock,
}
_BY_CHOICE: Mapping[str, Callable[[], Sandbox]] = {
    docker.NAME: docker.docker,
    unprotected.NAME: unprotected.unprotected,
}
NAMES = ("auto", *_BY_ITSELF, *_BY_CHOICE)
_PROBE_LIMITS = Limits(cpu_seconds=20, wall_seconds=60)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackEnd:
    """One way to a sandbox, and whether it works on this machine."""

    name: str
    sandbox: Sandbox | None
    reason: str
    """Why there is none; empty where there is one."""


def find_sandbox(name: str = "auto") -> Sandbox:
    """A sandbox that has just run a program.

    Args:
        name: One of `NAMES`. `auto` takes bubblewrap, else sandlock. `docker` and `none` are never taken unasked:
            `none` is no sandbox.

    Raises:
        SandboxError: None of that name works here; with the reason.
    """
    if name not in NAMES:
        raise SandboxError(f"The sandbox must be one of {', '.join(NAMES)}, got {name!r}.")
    if name != "auto":
        found = try_back_end(name)
        if found.sandbox is None:
            raise SandboxError(f"The sandbox {name!r} does not work here. {found.reason}")
        return found.sandbox
    reasons: list[str] = []
    for each in _BY_ITSELF:
        found = try_back_end(each)
        if found.sandbox is not None:
            return found.sandbox
        reasons.append(f"{each}: {found.reason}")
    raise SandboxError(
        "Programs that a model wrote need a sandbox, and none works here. "
        + " ".join(reasons)
        + " Docker can be chosen by name, and `none` runs them unprotected, which the results record."
    )


def try_back_end(name: str) -> BackEnd:
    """Whether a back end works on this machine, by running a program in it."""
    try:
        sandbox = {**_BY_ITSELF, **_BY_CHOICE}[name]()
        outcome = sandbox.run("print('ready')", _PROBE_LIMITS)
    except (SandboxError, OSError) as error:
        return BackEnd(name=name, sandbox=None, reason=str(error))
    if outcome.ended != "passed" or outcome.stdout != "ready\n":
        said = f"{outcome.ended}: {outcome.stderr.strip()}"
        return BackEnd(name=name, sandbox=None, reason=f"A program that prints a word must pass, it {said}.")
    return BackEnd(name=name, sandbox=sandbox, reason="")
