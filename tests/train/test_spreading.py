"""What the first process has on its disk reaches machines that do not share it, and is left alone where they do."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = """
import json, sys
from pathlib import Path
from dylora_moe import ranks
from dylora_moe.train import spreading
spreading._PIECE = 1000
ranks.join()
told = []
of_first = ranks.of_first
ranks.of_first = lambda tensor: told.append(len(tensor)) or of_first(tensor)
folder = Path("run")


def make():
    folder.mkdir(exist_ok=True)
    (folder / "made").write_text("by the first")
    return "made"


made = spreading.in_turn(lambda: make() if ranks.is_first() else (folder / "made").read_text(), folder)
first, told[:] = sum(told), []
spreading.spread(folder)
files = {path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in folder.rglob("*") if path.is_file()}
print(json.dumps({"made": made, "told": [first, sum(told)], "files": files}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two processes on each of two machines; the second machine has an old state of the folder."""
    disks = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    for disk in disks:
        (disk / "run" / "deep").mkdir(parents=True)
    (disks[0] / "run" / "deep" / "large.bin").write_bytes(bytes(range(250)) * 10)
    (disks[0] / "run" / "empty").touch()
    (disks[0] / "run" / ".lock").write_text("of the first")
    (disks[1] / "run" / "deep" / "large.bin").write_bytes(b"old")
    (disks[1] / "run" / "gone").write_text("old")
    return run_on([disks[0], disks[0], disks[1], disks[1]], on_each=2)


def run_on(disks: list[Path], *, on_each: int) -> list[dict[str, Any]]:
    """What each process tells, one for each entry, so many of them on each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": len(disks), "LOCAL_WORLD_SIZE": on_each, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": 1}
    started = []
    for rank, disk in enumerate(disks):
        own = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank % on_each}.items()}
        command = [sys.executable, "-c", WORKER]
        started.append(subprocess.Popen(command, env=os.environ | own, cwd=disk, stdout=subprocess.PIPE, text=True))
    return [json.loads(process.communicate(timeout=120)[0]) for process in started]


def test_all_find_what_the_first_has(told: list[dict[str, Any]]) -> None:
    whole = {"made": b"by the first".hex(), "deep/large.bin": (bytes(range(250)) * 10).hex(), "empty": ""}
    assert told[0]["files"] == told[1]["files"] == {**whole, ".lock": b"of the first".hex()}
    assert told[2]["files"] == told[3]["files"] == whole  # what is old is gone, and nothing half written is left
    assert [each["made"] for each in told] == ["made", *["by the first"] * 3]


def test_nothing_is_sent_where_all_share_a_disk(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("text")
    told = run_on([tmp_path, tmp_path], on_each=1)
    assert [each["told"] for each in told] == [[0, 0], [0, 0]] and told[0]["files"] == told[1]["files"]
