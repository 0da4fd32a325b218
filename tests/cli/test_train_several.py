"""`dylora train --nproc`: processes that share each batch, their one voice, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.cli.conftest import finish, start_python

from dylora_moe.run_dir import RunDir
from dylora_moe.train import launch

Run = Callable[..., Any]

COMMAND = "from dylora_moe.cli.main import main; main()"


@pytest.fixture
def recipe(tiny_settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    values = tiny_settings(batch_size=4, max_steps=60, save_steps=2, logging_steps=2, sample_tokens=0)
    path.write_text(json.dumps(values, default=str))
    return path


def start_and_signal_second(recipe: Path, number: int, step: int) -> tuple[int, str, str]:
    """Exit code and output of a run of two processes of which the second gets a signal once a checkpoint is there."""
    process = start_python(COMMAND, "train", recipe, "--nproc", 2)
    folder = recipe.parent / "runs" / "tiny" / "checkpoints" / f"step-{step:06d}"
    while not folder.exists() and process.poll() is None:
        time.sleep(0.02)
    second = next(each for each in psutil.Process(process.pid).children() if each.environ().get("RANK") == "1")
    second.send_signal(number)
    out, err = finish(process)
    return process.returncode, out, err


def losses(folder: Path) -> list[int]:
    """Steps of the lines of metrics with a loss."""
    return [line["step"] for line in RunDir(folder).read_lines("metrics.jsonl") if "loss" in line]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_and_one_process_goes_on(recipe: Path, command: Run) -> None:
    code, out, err = start_and_signal_second(recipe, signal.SIGTERM, 4)
    assert code == 75, err
    assert err.count("stopped, nothing is lost") == 1 and "Traceback" not in err
    assert out.count("Training for 60 steps") == 1
    assert command("train", recipe).code == 0
    assert losses(recipe.parent / "runs" / "tiny") == list(range(2, 61, 2))


@pytest.mark.slow
def test_when_a_process_is_killed_the_others_end_and_say_so(recipe: Path, command: Run) -> None:
    code, _, err = start_and_signal_second(recipe, signal.SIGKILL, 4)
    assert code == 137
    assert "Process 1 was ended by SIGKILL." in err and "Another process of this run ended" in err
    assert "Traceback" not in err
    assert command("train", recipe, "--nproc", 2).code == 0
    assert losses(recipe.parent / "runs" / "tiny") == list(range(2, 61, 2))


@pytest.mark.slow
def test_when_the_terminal_goes_no_process_is_left(recipe: Path, command: Run) -> None:
    """Which would train on, and keep the folder from the command that is given next."""
    process = start_python(COMMAND, "train", recipe, "--nproc", 2)
    folder = recipe.parent / "runs" / "tiny" / "checkpoints" / "step-000002"
    while not folder.exists() and process.poll() is None:
        time.sleep(0.02)
    several = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGHUP)
    _, err = finish(process)
    assert process.returncode == 128 + signal.SIGHUP and "Traceback" not in err
    assert not any(each.is_running() for each in several)
    assert command("train", recipe).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_other_launchers_start_the_same_run(recipe: Path, command: Run, launcher: str) -> None:
    """Bit for bit that of --nproc, dropout included."""
    start = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
        "accelerate": [
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
        ],
    }[launcher]
    short = ["--max_steps", "4", "--lora_dropout", "0.1"]
    assert command("train", recipe, "--nproc", 2, *short, "--run_name", "own").code == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "dylora_moe", "train", str(recipe), *short, "--run_name", "other"]
    done = subprocess.run(
        [sys.executable, "-m", *start, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    own, other = (RunDir(recipe.parent / "runs" / name).model_digest() for name in ("own", "other"))
    assert own == other


@pytest.mark.slow
def test_an_error_of_all_is_said_once(recipe: Path, command: Run) -> None:
    outcome = command("train", recipe, "--nproc", 2, "--datasets", "no_such_rows.jsonl")
    assert outcome.code == 1
    assert outcome.err.count("no_such_rows.jsonl") == 1 and "Traceback" not in outcome.err


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_starts(recipe: Path, dylora: Run) -> None:
    outcome = dylora("train", recipe, "--nproc", "3")
    assert outcome.code == 1 and "got 4 and 3" in outcome.err


def test_a_dry_run_is_of_one_process(recipe: Path, dylora: Run) -> None:
    outcome = dylora("train", recipe, "--nproc", "2", "--dry-run")
    assert outcome.code == 2 and "one process" in outcome.err


def test_processes_that_cannot_meet_say_so(recipe: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        outcome = command("train", recipe)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert f"must meet at 127.0.0.1:{port}, and this one cannot" in outcome.err and "in use" in outcome.err


def test_more_processes_than_gpus_are_refused(recipe: Path, dylora: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = dylora("train", recipe)
    assert outcome.code == 1 and "there are 2 processes and 1 GPUs on this machine" in outcome.err


def test_nproc_starts_processes_where_a_scheduler_counts_one(
    recipe: Path, dylora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes sets RANK and WORLD_SIZE for a single worker, too."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    started = list[int]()
    monkeypatch.setattr(launch, "launch", lambda arguments, count: started.append(count) or 75)
    assert dylora("train", recipe, "--nproc", "2").code == 75 and started == [2]


def test_two_launchers_are_refused(recipe: Path, dylora: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    outcome = dylora("train", recipe, "--nproc", "2")
    assert outcome.code == 2 and "another launcher has started 4. Leave --nproc out." in outcome.err
