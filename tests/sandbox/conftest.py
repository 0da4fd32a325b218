"""Every sandbox that works on this machine; and an end to tests that a failing sandbox would not let end."""

import signal
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from dylora_moe.sandbox import BackEnd, Sandbox, try_back_end

PROTECTING = ("bubblewrap", "sandlock", "docker")
_MOST_SECONDS = 150

try_once = cache(try_back_end)


def works(name: str) -> Sandbox:
    """The sandbox of that name; the test is skipped, with the reason, where it does not work."""
    found: BackEnd = try_once(name)
    if found.sandbox is None:
        pytest.skip(f"{name}: {found.reason}")
    return found.sandbox


@pytest.fixture(params=PROTECTING)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return works(request.param)


@pytest.fixture(params=[*PROTECTING, "none"])
def any_sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return works(request.param)


@pytest.fixture(autouse=True)
def outer_limit() -> Iterator[None]:
    def end(number: int, frame: Any) -> None:
        raise TimeoutError(f"the test must end within {_MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(_MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
