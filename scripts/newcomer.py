"""Do what README.md and the tutorials say, as a newcomer: a fresh clone, every command in order, until one fails.

    python scripts/newcomer.py                  in an empty folder and with an empty home: everything is downloaded
    python scripts/newcomer.py --own-home       with this user's home, so that what was downloaded before is used
    python scripts/newcomer.py --list           what would be done

Needs Python, git and bash, and no package: it runs before anything is installed. What is fenced as `bash` is done
command by command in one shell, what is fenced as `python` as a program of its own; other fences are not run.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ("first-mixture", "own-data", "continual-stream", "teacher", "serving")
PAGES = ("README.md", *(f"docs/tutorials/{name}.md" for name in TUTORIALS))
_FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HERE = re.compile(r"<<-?\s*'?(\w+)'?")
_MARK = "--newcomer-end-of-command--"
_KEPT_VARIABLES = re.compile(
    r"PATH|LANG|LC_\w+|TMPDIR|TERM|\w+_proxy|\w+_PROXY|PIP_\w+|SSL_\w+|REQUESTS_CA_BUNDLE|OMP_\w+"
)


@dataclass(frozen=True)
class Step:
    """One command, or one program, of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        first, *more = self.text.strip().splitlines()
        return f"{self.page}:{self.line}  {first}{' ...' if more else ''}"


def read_steps(text: str, page: str) -> list[Step]:
    """What a page tells to do, in order."""
    found = []
    for fence in _FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 2
        if fence[1] == "python":
            found.append(Step(page, line, "python", fence[2]))
            continue
        lines = fence[2].splitlines()
        place = 0
        while place < len(lines):
            first = place
            end = _HERE.search(lines[place])
            if end is not None:
                while lines[place] != end[1]:
                    place += 1
            while lines[place].endswith("\\"):
                place += 1
            place += 1
            command = "\n".join(lines[first:place])
            if command.strip() and not command.lstrip().startswith("#"):
                found.append(Step(page, line + first, "bash", command))
    return found


class Shell:
    """One bash in which commands follow each other, so that `cd`, `source` and `export` stay."""

    def __init__(self, folder: Path, environment: "dict[str, str]") -> None:
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.run("set -o pipefail")

    def run(self, command: str, seconds: float = 3600) -> "tuple[int, str]":
        """The exit code and what was written; -1 where the shell itself ended, or time ran out."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        limit = threading.Timer(seconds, self.close)
        limit.start()
        written = []
        try:
            self._bash.stdin.write(f"{{ {command}\n}} </dev/null\nprintf '\\n{_MARK} %s\\n' $?\n")
            self._bash.stdin.flush()
            for line in self._bash.stdout:
                if line.startswith(_MARK):
                    return int(line.split()[1]), "".join(written)
                written.append(line)
        except BrokenPipeError:
            pass
        finally:
            limit.cancel()
        return -1, "".join(written)

    def close(self) -> None:
        """End the shell and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.wait()


def follow(steps: "list[Step]", folder: Path, environment: "dict[str, str]") -> "Step | None":
    """Do the steps in `folder`; the first that fails, after which nothing more is done."""
    shell = Shell(folder, environment)
    scratch = Path(tempfile.mkdtemp(prefix="newcomer-"))
    try:
        for number, step in enumerate(steps, 1):
            command = step.text
            if step.language == "python":
                program = scratch / f"block_{number}.py"
                program.write_text(step.text, encoding="utf-8")
                command = f"python {program}"
            print(f"{number:3} of {len(steps)}  {step}", flush=True)
            begun = time.monotonic()
            code, written = shell.run(command)
            print(
                f"           {'ok' if code == 0 else f'exit code {code}'}, {time.monotonic() - begun:.1f} s", flush=True
            )
            if code != 0:
                print("\n".join(written.splitlines()[-60:]))
                print(f"\nFailed: {step}")
                return step
    finally:
        shell.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return None


def main() -> None:
    """Exit code 1 where a command failed."""
    parser = argparse.ArgumentParser(description="Do every command of README.md and the tutorials, on a fresh clone.")
    parser.add_argument("--source", default=str(ROOT), help="what to clone (this checkout, as committed)")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in (a temporary one)")
    parser.add_argument("--own-home", action="store_true", help="keep HOME, with its caches, instead of an empty one")
    parser.add_argument("--page", action="append", choices=PAGES, help="only this page; repeatable")
    parser.add_argument("--list", action="store_true", help="show the commands and do none")
    given = parser.parse_args()
    work = given.folder or Path(tempfile.mkdtemp(prefix="newcomer-"))
    clone = ROOT if given.list else work / "DyLoRA-MoE"
    if not given.list:
        subprocess.run(["git", "clone", "--quiet", given.source, str(clone)], check=True)
    pages = [page for page in PAGES if not given.page or page in given.page]
    steps = [step for page in pages for step in read_steps((clone / page).read_text(encoding="utf-8"), page)]
    if given.list:
        print("\n".join(map(str, steps)))
        return
    environment = {name: value for name, value in os.environ.items() if _KEPT_VARIABLES.fullmatch(name)}
    home = Path.home() if given.own_home else work / "home"
    home.mkdir(exist_ok=True)
    environment["HOME"] = str(home)
    begun = time.monotonic()
    failed = follow(steps, clone, environment)
    print(f"{len(steps)} commands, {(time.monotonic() - begun) / 60:.0f} min, in {work}")
    if failed is not None:
        sys.exit(1)
    if given.folder is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
