"""The run folder: one process at a time, records whole or not at all, and readable after a kill."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dylora_moe
from dylora_moe.errors import RunError
from dylora_moe.run_dir import RESULT, RunDir, environment, number_of

SOURCE = Path(dylora_moe.__file__).parents[1]
HOLD = """
import sys
from pathlib import Path
from dylora_moe.run_dir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "mine")


@pytest.fixture
def holder(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    """Another process that keeps the folder's lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_two_processes_cannot_hold_one_folder(run: RunDir, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(RunError, match="in use by another process") as caught, run.locked():
        pytest.fail("both hold it")
    assert str(run.path) in str(caught.value) and "--run_name" in str(caught.value)
    holder.communicate("")
    with run.locked():
        pass


def test_a_killed_process_leaves_no_lock(run: RunDir, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with run.locked():
        pass


def test_an_error_inside_lets_go_of_the_lock(run: RunDir) -> None:
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    with run.locked():
        pass


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="file"), RunDir(tmp_path / name).locked():
        pytest.fail("locked a file")
    assert (tmp_path / "file").read_text() == "mine"


def test_lines_come_back_as_they_were_appended(run: RunDir) -> None:
    records = [{"step": 1, "text": "\u00e9\n\u2028\u2029\x85\x0c"}, {"step": 2, "loss": 0.5}]
    with run.locked():
        for record in records:
            run.append("metrics.jsonl", record)
    assert run.read_lines("metrics.jsonl") == records
    assert (run / "metrics.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("missing_bytes", [1, 2, 3, 4, 5, 13])
def test_a_last_line_that_was_cut_off_is_left_out(run: RunDir, missing_bytes: int) -> None:
    whole = b'{"step": 1}\n' + '{"text": "n\u00e9"}'.encode()
    run.path.mkdir(parents=True)
    (run / "samples.jsonl").write_bytes(whole[:-missing_bytes])
    assert run.read_lines("samples.jsonl") == [{"step": 1}]


def test_what_a_killed_process_left_of_a_file_is_nothing(run: RunDir) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from dylora_moe.run_dir import RunDir\n"
        "os.replace = lambda *paths: os._exit(9)\n"
        "RunDir(pathlib.Path(sys.argv[1])).write(sys.argv[2], 'half')\n"
    )
    for name in ("config.yaml", ".lock.json", "metrics.jsonl"):
        assert subprocess.run([sys.executable, "-c", code, str(run.path), name]).returncode == 9
    assert len(list(run.path.iterdir())) >= 3 and run.is_empty
    (run.path / ".hidden").touch()
    assert not run.is_empty


def test_lines_of_a_file_that_is_not_there_are_none(run: RunDir) -> None:
    assert run.read_lines("metrics.jsonl") == []


def test_a_reader_never_sees_a_part_of_a_file(run: RunDir) -> None:
    texts = {letter * 200_000 for letter in "ab"}
    run.write("record.json", "a" * 200_000)
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add((run / "record.json").read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for text in sorted(texts):
            run.write("record.json", text)
    done.set()
    reader.join()
    assert seen <= texts


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(run: RunDir) -> None:
    run.write(RESULT, {"steps": 3})
    with pytest.raises(UnicodeEncodeError):
        run.write(RESULT, "new \ud800")
    with pytest.raises(TypeError):
        run.write(RESULT, {"steps": object()})
    assert run.read(RESULT) == {"steps": 3}
    assert [path.name for path in run.path.iterdir()] == [RESULT]


def test_files_are_readable_by_others_and_made_in_new_folders(run: RunDir) -> None:
    run.write("eval/routed.json", {"loss": 1.5, "name": "\u00e9"})
    assert (run / "eval" / "routed.json").stat().st_mode & 0o777 == 0o644
    assert json.loads((run / "eval" / "routed.json").read_text(encoding="utf-8")) == {"loss": 1.5, "name": "\u00e9"}


def test_what_is_missing_or_broken_is_told(run: RunDir) -> None:
    with pytest.raises(RunError, match=r"holds no result\.json; is it a run folder"):
        run.read(RESULT)
    run.write(RESULT, '{"steps": ')
    with pytest.raises(RunError, match=r"result\.json is no valid JSON"):
        run.read(RESULT)


def test_a_run_is_finished_when_its_result_is_there(run: RunDir) -> None:
    run.write("config.yaml", "seed: 0\n")
    assert not run.is_finished
    run.write(RESULT, {})
    assert run.is_finished


def test_the_hundredth_stage_comes_after_the_eleventh() -> None:
    names = ["02-b", "100-c", "11-a"]
    assert sorted(map(Path, names), key=number_of) == [Path("02-b"), Path("11-a"), Path("100-c")]


def test_the_environment_names_versions_and_hardware() -> None:
    record = environment()
    assert record["packages"]["torch"] and record["packages"]["transformers"] and record["packages"]["peft"]
    assert record["cores"] == os.cpu_count() and record["processor"] and record["python"] and record["command"]
    json.dumps(record)
