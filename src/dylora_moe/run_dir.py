"""The run folder: file names, one writer at a time, lines appended and records written whole.

It is all that stages share: training writes, evaluation, chat and reports read.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dylora_moe.cache.disk import hash_file
from dylora_moe.errors import RunError

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
ROUTING = "routing.jsonl"
EXPERTS = "experts.jsonl"
SAMPLES = "samples.jsonl"
DATA = "data.json"
REMOVED = "removed.jsonl"
START = "start.json"
CHECKPOINTS = "checkpoints"
TRACKERS = "trackers"
RESULT = "result.json"
FINAL = "final"
EVAL = "eval"
STAGES = "stages"
DECISION = "decision.json"
STAGE = "stage.json"
UNDONE = "undone"
SEGMENTS = "segments"
REPORT = "report.html"
WARNINGS = "warnings.jsonl"
_LINES = (METRICS, ROUTING, SAMPLES, WARNINGS)
# What a run writes between its start and its end.
_BEGUN = (CONFIG, ENVIRONMENT, DATA, START, *_LINES)
# What `write` leaves of a file when its process is killed.
_UNFINISHED = re.compile(r"\.\.?[a-z]+\.(json|jsonl|yaml)\.[a-z0-9_]{8}")
_LOCK, _HOLDER = ".lock", ".lock.json"
REMOTE = ".remote"
"""Folder of what is on its way to or from a remote folder."""
# gs://bucket/runs as a path has it.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")
_STAGE_NAME = re.compile(r"\d+-")

_PACKAGES = (
    "dylora-moe",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "liger-kernel",
)


class RunDir:
    """One run's folder. Paths, and the two ways to write: append a line, or replace a file whole.

    Args:
        path: Of the folder.
        writes: False for a process that trains beside the one whose folder it is: all that it would write, that one
            writes.

    Raises:
        RunError: The path is the address of a remote folder.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        if (remote := _ADDRESS.fullmatch(self.path.as_posix())) is not None:
            raise RunError(
                f"a run folder must be on this machine, got {remote[1]}://... Get it with `dylora fetch ADDRESS`, and "
                "take the folder that it makes; to train, give the address as remote_dir."
            )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def is_empty(self) -> bool:
        """True when the folder holds nothing but its lock, and files that a process was killed in the middle of."""
        return all(
            entry.name in (_LOCK, _HOLDER, REMOTE) or _UNFINISHED.fullmatch(entry.name) for entry in self.path.iterdir()
        )

    @property
    def is_finished(self) -> bool:
        """True when training ended well: the result is written last."""
        return (self.path / RESULT).is_file()

    def model_digest(self) -> str:
        """Of all that the run ended with: router, experts, tokenizer and template."""
        return digest_folder(self / FINAL)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the system lets go of the lock when the process ends, however.

        Raises:
            RunError: another process works in the folder.
        """
        if not self.writes:
            yield
            return
        lock = FileLock(self.path / _LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"{self.path} is in use by another process{self._holder()}. Wait for it, or choose another --run_name."
            ) from error
        except OSError as error:
            raise RunError(f"the run folder {self.path} must be a folder that can be written: {error}.") from error
        try:
            self.write(_HOLDER, {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")})
            yield
        finally:
            (self.path / _HOLDER).unlink(missing_ok=True)
            lock.release()

    def _holder(self) -> str:
        """Who says to hold the lock, for a person to read."""
        try:
            holder = self.read(_HOLDER)
            return f" (number {holder['process']} on {holder['host']}, since {holder['since']})"
        except (RunError, KeyError, OSError):
            return ""

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one JSON line to a file."""
        if not self.writes:
            return
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def write(self, name: str, content: str | bytes | Mapping[str, Any]) -> None:
        """Write a file whole: readers see the old one or the new one, never a part."""
        if not self.writes:
            return
        if isinstance(content, Mapping):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        data = content.encode() if isinstance(content, str) else content
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def copy_to(self, folder: Path) -> None:
        """Copy into a new folder what a run has before it ends, its lines and what it began with, to go on from."""
        folder.mkdir()
        for name in _BEGUN:
            if (path := self.path / name).is_file():
                shutil.copyfile(path, folder / name)

    def clear(self) -> None:
        """Delete what a run writes between its start and its end; not its settings, by which it is known."""
        for name in _BEGUN if self.writes else ():
            if name != CONFIG:
                (self.path / name).unlink(missing_ok=True)

    def copy_from(self, folder: Path) -> None:
        """Be as the run was when `copy_to` filled the folder."""
        self.clear()
        for name in _BEGUN:
            if (path := folder / name).is_file():
                self.write(name, path.read_bytes())

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run.

        Raises:
            RunError: it is not there or does not parse.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{self.path} holds no {name}; is it a run folder, and did the run get that far?") from error
        except json.JSONDecodeError as error:
            raise RunError(f"{path} is no valid JSON: {error}.") from error

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a file of JSON lines; a last line that was cut off by a kill is left out."""
        path = self.path / name
        if not path.is_file():
            return []
        records = []
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records


def digest_folder(folder: Path) -> str:
    """A hash of all files in a folder and of their names, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def number_of(stage: Path) -> int:
    """Of a stage, by its folder: the hundredth comes after the eleventh."""
    return int(stage.name.partition("-")[0])


def stage_folders(run: RunDir) -> list[Path]:
    """Folders of all stages in their order, those that do not count included; what else lies there is no stage."""
    found = [path for path in run.path.glob(f"{STAGES}/*") if _STAGE_NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=number_of)


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": packages,
        "command": sys.argv,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
