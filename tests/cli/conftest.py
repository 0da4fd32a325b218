"""The command line, run inside this process or as a real command, and one run that a real command trained."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from tests.tiny import lean_process, settings, tiny_base, tiny_rows, tiny_settings, write_base, write_rows

import dylora_moe
from dylora_moe.cli.main import main

__all__ = ["lean_process", "tiny_base", "tiny_rows", "tiny_settings"]

SOURCE = Path(dylora_moe.__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as strict JSON, one line and nothing else."""
        assert self.code == 0, self.err
        assert self.out.endswith("\n") and self.out.count("\n") == 1, self.out
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A finished run, not to be changed; the arguments that trained it, and how the command ended."""

    folder: Path
    base: Path
    arguments: tuple[str, ...]
    outcome: Outcome
    result: dict[str, Any]


def start_python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A new Python process on the same sources, for text on its three streams."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, **pipes | options
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[str, str]:
    """What a process writes until its end; one that does not end is killed."""
    try:
        return process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"no end after {timeout_s:.0f} s; standard output {out[-1000:]!r}, standard error {err[-3000:]!r}")


@pytest.fixture(scope="session")
def command() -> Callable[..., Outcome]:
    """(*arguments) -> the outcome of `dylora` with them, as a process of its own."""

    def run(*arguments: object) -> Outcome:
        process = start_python("from dylora_moe.cli.main import main; main()", *arguments)
        out, err = finish(process)
        return Outcome(code=process.returncode, out=out, err=err)

    return run


@pytest.fixture
def dylora(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """(*arguments) -> the outcome of `dylora` with them, in this process; any error but a proper exit comes through."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
            main(list(map(str, arguments)))
        code = exit.value.code
        return Outcome(code=code if isinstance(code, int) else 0, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def finished(command: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Trained by a recipe with two flags on top, with --json; once for all workers of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "finished"
    folder.mkdir(exist_ok=True)
    recipe, record = folder / "three-domains.yaml", folder / "outcome.json"
    arguments = ("train", str(recipe), "--max_steps", "5", "--lora-alpha", "16")
    with FileLock(folder / ".lock"):
        if not record.is_file():
            values = settings(write_base(folder / "base"), write_rows(folder), folder / "runs")
            del values["run_name"]
            recipe.write_text(yaml.safe_dump(values))
            record.write_text(json.dumps(asdict(command(*arguments, "--json"))))
    outcome = Outcome(**json.loads(record.read_text()))
    assert outcome.code == 0, outcome.err
    run_dir = folder / "runs" / "three-domains"
    result = json.loads((run_dir / "result.json").read_text())
    return FinishedRun(folder=run_dir, base=folder / "base", arguments=arguments, outcome=outcome, result=result)


@pytest.fixture
def recipe(tiny_settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """(**changes) -> a recipe file of a short tiny run in the test's own folder."""

    def write(**changes: Any) -> Path:
        values = tiny_settings(**{"max_steps": 1, "sample_tokens": 0, "eval_subset": 40} | changes)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not ...}))
        return path

    return write


HOLD = """
import sys
from pathlib import Path
from dylora_moe.run_dir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """(folder) -> another process holds the folder's lock until the test ends."""
    holders = []

    def start(folder: Path) -> None:
        process = start_python(HOLD, folder)
        holders.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"

    yield start
    for process in holders:
        process.kill()
        process.communicate()
