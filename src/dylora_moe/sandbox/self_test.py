"""A sandbox -> what good programs and attacks came to in it, really run and judged from outside."""

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dylora_moe.sandbox.attacks import ATTACKS, Attack
from dylora_moe.sandbox.limits import Limits, Outcome
from dylora_moe.sandbox.sandbox import Sandbox
from dylora_moe.sandbox.scene import SECRET_PATTERN, Scene, set_scene, watching

Verdict = Literal["passed", "failed", "stopped", "not stopped", "not run"]

_GOOD: dict[str, tuple[str, str]] = {
    "a plain program": ("print(sum(range(10)))", "45\n"),
    "standard modules": (
        "import asyncio, collections, ctypes, datetime, functools, hashlib, heapq, itertools, json, math, random, re\n"
        "import sqlite3, statistics, string, subprocess, sys, tempfile, threading, typing\n"
        "async def answer():\n    return json.dumps([math.gcd(12, 18), re.sub('a', 'b', 'aa')])\n"
        "thread = threading.Thread(target=lambda: print(asyncio.run(answer())))\nthread.start()\nthread.join()",
        '[6, "bb"]\n',
    ),
    "an empty standard input": ("import sys\nprint(repr(sys.stdin.read()))", "''\n"),
    "files of its own": (
        "import os, tempfile\nopen('a.txt', 'w').write('b')\nprint(open('a.txt').read(), sorted(os.listdir('.')))\n"
        "with tempfile.TemporaryFile(dir='.') as file:\n    file.write(b'x')",
        "b ['a.txt', 'main.py']\n",
    ),
    "processes of its own": (
        "import os\nif not os.fork():\n    os._exit(7)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))",
        "7\n",
    ),
}
_GOOD_LIMITS = Limits(cpu_seconds=10, wall_seconds=60, memory_bytes=512 << 20)
_OUTSIDE = (("1.1.1.1", 53), ("8.8.8.8", 53))
_OUTSIDE_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One program that was run, and what it came to."""

    name: str
    kind: Literal["good program", "attack"]
    must_hold: str
    verdict: Verdict
    detail: str
    """What an attack got, what a good program lacked, or why nothing was run; else how it ended."""
    seconds: float

    @property
    def is_well(self) -> bool:
        """Whether it went as it must, or could not be tried."""
        return self.verdict in ("passed", "stopped", "not run")


def self_test(sandbox: Sandbox) -> Iterator[Trial]:
    """Runs good programs and every attack, one after the other, about 20 s in all.

    Other programs should not run below this process meanwhile: what runs there is counted.

    Raises:
        SandboxError: The sandbox failed before a program began.
    """
    for name, (program, expected) in _GOOD.items():
        started = time.monotonic()
        outcome = sandbox.run(program, _GOOD_LIMITS)
        is_right = outcome.ended == "passed" and outcome.stdout == expected
        yield Trial(
            name=name,
            kind="good program",
            must_hold="it passes",
            verdict="passed" if is_right else "failed",
            detail=outcome.ended
            if is_right
            else f"{outcome.ended}: {(outcome.stderr or outcome.stdout)[-300:].strip()}",
            seconds=time.monotonic() - started,
        )
    for attack in ATTACKS:
        yield try_attack(sandbox, attack)


def try_attack(sandbox: Sandbox, attack: Attack) -> Trial:
    """Runs an attack in a scene of its own."""
    started = time.monotonic()
    verdict: Verdict = "not run"
    if detail := _why_not(attack):
        return Trial(
            name=attack.name, kind="attack", must_hold=attack.must_hold, verdict=verdict, detail=detail, seconds=0
        )
    with set_scene() as scene:
        with watching() as seen:
            outcome = sandbox.run(_with_values(attack.program, scene), attack.limits)
        got = attack.got(scene, outcome, seen)
    return Trial(
        name=attack.name,
        kind="attack",
        must_hold=attack.must_hold,
        verdict="not stopped" if got else "stopped",
        detail=f"got {got}" if got else _ended(outcome),
        seconds=time.monotonic() - started,
    )


def _why_not(attack: Attack) -> str:
    if attack.name != "reach the network":
        return ""
    for address in _OUTSIDE:
        try:
            socket.create_connection(address, timeout=_OUTSIDE_SECONDS).close()
        except OSError:
            continue
        return ""
    return "this machine itself reaches nothing outside"


def _ended(outcome: Outcome) -> str:
    """A program that found no way ends by itself."""
    return {"passed": "found no way", "failed": "found no way"}.get(outcome.ended, f"ended by: {outcome.ended}")


def _with_values(program: str, scene: Scene) -> str:
    values = {
        "token": scene.token,
        "pattern": SECRET_PATTERN,
        "folder": str(scene.folder),
        "secret_files": [str(path) for path in scene.secret_files],
        "guarded": str(scene.guarded),
        "victim": scene.victim.pid,
        "parent": os.getpid(),
        "port": scene.port,
        "socket_path": str(scene.socket_path),
        "own_source": os.path.abspath(__file__),
    }
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + program
