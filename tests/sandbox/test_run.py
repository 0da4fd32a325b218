"""Programs in every sandbox of this machine, and in none: how they end, and what they find."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from tests.sandbox.conftest import PROTECTING, works

from dylora_moe.errors import SandboxError
from dylora_moe.sandbox import Limits, Sandbox
from dylora_moe.sandbox.watch import Launch, run_watched

LIMITS = Limits(cpu_seconds=5, wall_seconds=60, memory_bytes=512 << 20)


def test_a_program_passes_and_says_what_it_says(any_sandbox: Sandbox) -> None:
    outcome = any_sandbox.run("import sys\nprint('caf\u00e9')\nprint('oops', file=sys.stderr)", LIMITS)
    assert (outcome.ended, outcome.exit_code) == ("passed", 0)
    assert (outcome.stdout, outcome.stderr) == ("caf\u00e9\n", "oops\n")
    assert outcome.wall_seconds > 0 and (outcome.cpu_seconds is None or 0 < outcome.cpu_seconds < 5)


@pytest.mark.parametrize(
    ("program", "ended", "code"),
    [
        ("raise SystemExit(3)", "failed", 3),
        ("assert 1 == 2", "failed", 1),
        ("def", "failed", 1),
        ("import os; os._exit(0)", "passed", 0),
        ("import os; os.kill(os.getpid(), 9)", "killed", None),
        ("import os; os.abort()", "killed", None),
        ("bytearray(1 << 30)", "memory", None),
        ("x = [0]\nwhile True: x += x", "memory", None),
    ],
)
def test_how_a_program_ends(any_sandbox: Sandbox, program: str, ended: str, code: int | None) -> None:
    outcome = any_sandbox.run(program, LIMITS)
    assert (outcome.ended, outcome.exit_code) == (ended, code), outcome


def test_an_error_is_told_with_its_line(any_sandbox: Sandbox) -> None:
    outcome = any_sandbox.run("\nassert [1] == [2], 'differ'", LIMITS)
    assert "line 2" in outcome.stderr and "AssertionError: differ" in outcome.stderr


def test_processor_time_is_judged_apart_from_wall_time(any_sandbox: Sandbox) -> None:
    busy = any_sandbox.run("while True: pass", Limits(cpu_seconds=0.5, wall_seconds=60))
    assert busy.ended == "cpu time" and busy.exit_code is None and busy.wall_seconds < 30
    asleep = any_sandbox.run("print('so far', flush=True)\nimport time\ntime.sleep(60)", Limits(wall_seconds=1.5))
    assert asleep.ended == "wall time" and asleep.stdout == "so far\n" and asleep.wall_seconds < 15
    assert asleep.cpu_seconds is None or asleep.cpu_seconds < 1


def test_the_processor_time_of_children_counts(any_sandbox: Sandbox) -> None:
    if any_sandbox.name == "docker":
        pytest.skip("nobody outside can tell it")
    program = (
        "import os, time\nif not os.fork():\n    while time.process_time() < 0.4: pass\n    os._exit(0)\nos.wait()"
    )
    assert 0.35 < (any_sandbox.run(program, LIMITS).cpu_seconds or 0) < 2


def test_output_is_cut_at_its_limit(any_sandbox: Sandbox) -> None:
    limits = Limits(output_bytes=1000)
    for stream in ("stdout", "stderr"):
        outcome = any_sandbox.run(f"import sys\nwhile True: sys.{stream}.write('x' * 99)", limits)
        assert outcome.ended == "output" and getattr(outcome, stream) == "x" * 1000
    assert any_sandbox.run("print('x' * 999)", limits).ended == "passed"


def test_its_folder_is_empty_its_own_and_removed(any_sandbox: Sandbox) -> None:
    before = set(Path(tempfile.gettempdir()).glob("dylora-sandbox-*"))
    program = "import os\nprint(os.getcwd(), os.listdir('.'))\nos.mkdir('deep')\nopen('deep/file', 'w').write('x')"
    said = [any_sandbox.run(program, LIMITS).stdout.split(" ", 1) for _ in range(2)]
    assert [files for _, files in said] == ["['main.py']\n"] * 2
    assert set(Path(tempfile.gettempdir()).glob("dylora-sandbox-*")) <= before
    assert all(not (Path(folder) / "main.py").exists() for folder, _ in said)


def test_environment_and_input_are_empty(any_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    outcome = any_sandbox.run("import os, sys\nprint(sorted(os.environ), repr(sys.stdin.read()))", LIMITS)
    assert outcome.stdout in ("[] ''\n", "['LC_CTYPE'] ''\n")  # Python itself sets the second, where it has no locale


def test_limits_are_held_by_the_kernel_and_cannot_be_raised(any_sandbox: Sandbox) -> None:
    program = """
import resource
for name in ("AS", "FSIZE", "CORE", "CPU"):
    kind = getattr(resource, f"RLIMIT_{name}")
    print(name, *resource.getrlimit(kind))
    if name != "CPU":
        try:
            resource.setrlimit(kind, (1 << 40, 1 << 40))
            print("raised", name)
        except (OSError, ValueError):
            pass
"""
    said = any_sandbox.run(program, Limits(memory_bytes=300 << 20, file_bytes=3 << 20, cpu_seconds=2.5)).stdout
    held = f"AS {300 << 20} {300 << 20}\nFSIZE {3 << 20} {3 << 20}\nCORE 0 0\nCPU 3 4\n"
    assert "".join(line for line in said.splitlines(True) if "raised" not in line) == held
    assert "raised" not in said or any_sandbox.name == "none"  # root may


def test_a_program_has_no_rights(sandbox: Sandbox) -> None:
    """Those of root, such as to make the device of a disk; source: capget(2)."""
    program = """
import ctypes
sets = (ctypes.c_uint32 * 6)()
failed = ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets)
effective, permitted = sets[0] | sets[3], sets[1] | sets[4]
print(failed, effective, permitted)
"""
    assert sandbox.run(program, LIMITS).stdout == "0 0 0\n"


def test_packages_are_not_there(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import click", LIMITS)
    assert outcome.ended == "failed" and "No module named 'click'" in outcome.stderr


def test_a_long_program_arrives_whole(any_sandbox: Sandbox) -> None:
    lines = [f"x{number} = {number}" for number in range(30_000)]
    assert any_sandbox.run("\n".join([*lines, "print(x29999)"]), LIMITS).stdout == "29999\n"


def test_several_run_at_once(any_sandbox: Sandbox) -> None:
    def run(number: int) -> str:
        return any_sandbox.run(f"import time\ntime.sleep(0.5)\nprint({number})", LIMITS).stdout

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(8))) == [f"{number}\n" for number in range(8)]


def test_file_descriptors_are_given_back(any_sandbox: Sandbox) -> None:
    any_sandbox.run("pass", LIMITS)
    before, others = psutil.Process().num_fds(), psutil.Process().children()  # of other tests in this process
    for program in ("pass", "raise SystemExit(1)", "import time\ntime.sleep(60)"):
        any_sandbox.run(program, Limits(wall_seconds=1))
    assert psutil.Process().num_fds() == before and set(psutil.Process().children()) <= set(others)


def test_a_sandbox_that_fails_before_the_program_is_no_failed_program() -> None:
    launch = Launch(command=[sys.executable, "-c", "import sys; sys.exit('no namespaces here')"])
    with pytest.raises(SandboxError, match="no namespaces here"):
        run_watched(launch, "print(1)", LIMITS)


def test_an_interrupted_run_leaves_nothing(any_sandbox: Sandbox) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    others = psutil.Process().children(recursive=True)  # of other tests in this process
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        killer = subprocess.Popen(["sh", "-c", 'sleep 1; kill -USR1 "$1"', "sh", str(os.getpid())])
        with pytest.raises(KeyboardInterrupt):
            any_sandbox.run("import time\ntime.sleep(60)", LIMITS)
    finally:
        killer.wait()
        signal.signal(signal.SIGUSR1, before)
    assert set(psutil.Process().children(recursive=True)) <= set(others)


@pytest.mark.parametrize("name", [name for name in PROTECTING if name != "docker"])
def test_a_program_ends_with_the_process_that_runs_it(name: str, tmp_path: Path) -> None:
    works(name)
    code = (
        "from dylora_moe.sandbox import Limits, bubblewrap, landlock\n"
        "make = {'bubblewrap': bubblewrap.bubblewrap, 'sandlock': landlock.landlock}\n"
        f"make[{name!r}]().run('import time; time.sleep(100)', Limits(wall_seconds=100))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    with killed_afterwards(process):
        inside = until_some(process)
        process.kill()
        process.wait()
        psutil.wait_procs(inside, timeout=10)
        assert not [each for each in inside if each.is_running()]
        assert not list(tmp_path.iterdir())


@contextmanager
def killed_afterwards(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()


def until_some(process: "subprocess.Popen[bytes]") -> Sequence[psutil.Process]:
    """The processes below one, once the program runs among them."""
    for _ in range(300):
        found = psutil.Process(process.pid).children(recursive=True)
        with suppress(psutil.Error):  # one that has just ended
            if any(re.search(r"-I main\.py$", " ".join(each.cmdline())) for each in found):
                return found
        time.sleep(0.05)
    pytest.fail("the program did not start")
