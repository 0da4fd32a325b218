"""`dylora container`, as Vertex AI runs it: a real process, killed as a spot machine is, and started the same way."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import SOURCE
from tests.train.whole import HARD, outcome

from dylora_moe.cloud.job import JobSettings, make_job
from dylora_moe.cloud.recipe import sent_settings
from dylora_moe.config import RunConfig, make_config
from dylora_moe.run_dir import RunDir

HAS_REMOTE = "remote_dir" in RunConfig.model_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a container runs.

    Attributes:
        command: Of the container, with this Python's `dylora`.
        environment: What the job and Vertex AI set.
        disk: What is lost with the machine.
    """

    command: list[str]
    environment: dict[str, str]
    disk: Path

    def start(self) -> "subprocess.Popen[str]":
        """The container's process."""
        self.disk.mkdir(exist_ok=True)
        pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command, cwd=self.disk, env=os.environ | self.environment, **pipes)


ONE_MACHINE = {
    "cluster": {"workerpool0": ["cmle-training-workerpool0-4c1d6d97d0-0:2222"]},
    "environment": "cloud",
    "task": {"type": "workerpool0", "index": 0},
}


@pytest.fixture
def settings(tiny_settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a tiny run whose data and base are where a container would find a bucket."""
    from dylora_moe.cloud import recipe

    monkeypatch.setattr(recipe, "_BUCKETS", "/")
    values = tiny_settings(**HARD)
    del values["output_dir"]
    return values


@pytest.fixture
def machine(settings: dict[str, Any], tmp_path: Path) -> Machine:
    """One on which Vertex AI starts the run's job."""
    return machine_of(settings, tmp_path)


def machine_of(settings: dict[str, Any], tmp_path: Path) -> Machine:
    """One on which Vertex AI starts the job of these settings."""
    job = make_job(
        JobSettings(
            project="p", region="us-central1", output="gs://bucket/runs", image="i", machine="n1-standard-4", gpus=None
        ),
        sent_settings(make_config(settings)),
    )
    container = job["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]
    assert container["command"] == ["dylora", "container"]
    bucket = (tmp_path / "bucket").as_uri()
    environment = {
        **{each["name"]: each["value"] for each in container["env"]},
        "CLOUD_ML_PROJECT_ID": "1234",
        "CLUSTER_SPEC": json.dumps(ONE_MACHINE),
        "AIP_TENSORBOARD_LOG_DIR": f"{bucket}/tiny/logs/",
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
    }
    if HAS_REMOTE:
        environment |= {
            "AIP_CHECKPOINT_DIR": f"{bucket}/tiny/checkpoints/",
            "AIP_MODEL_DIR": f"{bucket}/tiny/model/",
        }

    command = [sys.executable, "-m", "dylora_moe", *container["command"][1:]]
    return Machine(command=command, environment=environment, disk=tmp_path / "disk")


def wait_for_another(folder: Path, process: "subprocess.Popen[str]") -> None:
    """Until there is a checkpoint that was not there at the start."""
    before = {path.name for path in folder.glob("step-*")}
    while not {path.name for path in folder.glob("step-*")} - before and process.poll() is None:
        time.sleep(0.005)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
def test_a_container_that_was_killed_goes_on(
    machine: Machine, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The process is a real one; what it becomes the second time is run here, to save its start."""
    from dylora_moe.cli.main import main

    process = machine.start()
    wait_for(tmp_path / "disk/runs/tiny/checkpoints/step-000003", process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path / "disk")
    monkeypatch.setattr(os, "execve", lambda program, command, environment: main(list(command[3:])))
    with pytest.raises(SystemExit) as exit:
        main(["container"])
    assert exit.value.code == 0 and "Going on from step-000003" in capsys.readouterr().out
    assert outcome(RunDir(tmp_path / "disk/runs/tiny")) == whole(settings, tmp_path)


def whole(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """What the run leaves that nothing stops."""
    from dylora_moe.train.run import train

    config = make_config(settings | {"output_dir": str(tmp_path / "whole")})
    train(config)
    return outcome(RunDir(config.run_dir))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost",
    [
        0,
        pytest.param(3, marks=pytest.mark.skipif(not HAS_REMOTE, reason="this version has no remote run folders")),
    ],
    ids=["same disk", "new disks"],
)
def test_a_spot_machine_ends_with_the_uninterrupted_result(settings: dict[str, Any], tmp_path: Path, lost: int) -> None:
    """Taken away ten times, at random, with its disk as often as `lost`; then left alone, and started once more."""
    settings |= {"max_steps": 400, "num_epochs": 400, "eval_steps": 100}  # more than a quiet machine makes in ten times
    machine, chance, kills = machine_of(settings, tmp_path), random.Random(lost), 10
    runs = machine.disk / "runs"
    losing = set(chance.sample(range(2, kills), lost))
    went_on = 0
    for number in range(kills):
        process = machine.start()
        if chance.random() < 0.8:
            wait_for_another(runs / "tiny" / "checkpoints", process)
        time.sleep(chance.uniform(0, 1))
        signalled = chance.choice((signal.SIGKILL, signal.SIGTERM))
        process.send_signal(signalled)
        out, text = process.communicate(timeout=120)
        # Before it trains, nothing takes SIGTERM, and nothing is lost.
        assert process.returncode in {-signalled, 75 if signalled == signal.SIGTERM else -signalled}, text
        went_on += "Going on from step-" in out + text
        if number in losing:
            shutil.rmtree(machine.disk)
    process = machine.start()
    out, text = process.communicate(timeout=600)
    assert process.returncode == 0 and "Going on from step-" in out + text, text
    assert went_on >= 5
    assert outcome(RunDir(runs / "tiny")) == whole(settings, tmp_path)
    again = machine.start()
    out, text = again.communicate(timeout=120)
    assert again.returncode == 0 and "finished already" in out + text


def two_machines(settings: dict[str, Any], tmp_path: Path) -> list[Machine]:
    """Those of a job with two workers: one bucket, and a disk each, which they do not share."""
    tmp_path.mkdir(exist_ok=True)
    one = machine_of(settings, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = {"workerpool0": [f"127.0.0.1:{port}"], "workerpool1": ["127.0.0.1:2222"]}
    machines = []
    for pool in cluster:
        spec = {"cluster": cluster, "environment": "cloud", "task": {"type": pool, "index": 0}}
        environment = one.environment | {"CLUSTER_SPEC": json.dumps(spec)}
        machines.append(Machine(command=one.command, environment=environment, disk=tmp_path / pool))
    return machines


def ends_of(processes: "list[subprocess.Popen[str]]") -> list[tuple[int, str]]:
    """(exit code, what was written) of each."""
    texts = ["".join(process.communicate(timeout=300)) for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_REMOTE, reason="this version has no remote run folders")
def test_two_machines_that_share_no_disk_go_on(settings: dict[str, Any], tmp_path: Path) -> None:
    """One is told to end, so both do; then the disk of the first is lost; the end is that of two left alone."""
    whole = two_machines(settings, tmp_path / "whole")
    assert [code for code, _ in ends_of([machine.start() for machine in whole])] == [0, 0]
    machines = two_machines(settings, tmp_path / "stopped")
    processes = [machine.start() for machine in machines]
    wait_for(machines[0].disk / "runs/tiny/checkpoints/step-000006", processes[0])
    processes[1].terminate()
    assert [code for code, _ in ends_of(processes)] == [75, 75]
    shutil.rmtree(machines[0].disk)
    ended = ends_of([machine.start() for machine in machines])
    assert [code for code, _ in ended] == [0, 0], ended
    assert "Going on from step-" in ended[0][1]
    runs = [RunDir(each[0].disk / "runs/tiny") for each in (whole, machines)]
    assert outcome(runs[0]) == outcome(runs[1])
    shutil.rmtree(machines[1].disk)  # which has nothing that the other needs
    assert [code for code, _ in ends_of([machine.start() for machine in machines])] == [0, 0]


def test_secrets_reach_the_run_and_nothing_else(monkeypatch: pytest.MonkeyPatch, dylora: Any, tmp_path: Path) -> None:
    """The process that trains has them in its environment; they are in no output, no argument and no file."""
    from dylora_moe.cloud import secrets

    token = "hf_" + "aB3" * 11
    monkeypatch.setattr(secrets, "_from_secret_manager", lambda: lambda name: token)
    monkeypatch.setenv("DYLORA_RECIPE", yaml.safe_dump({"run_name": "tiny"}))
    monkeypatch.setenv("DYLORA_SECRETS", json.dumps({"HF_TOKEN": "projects/p/secrets/hf/versions/latest"}))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    replaced: list[Any] = []

    def execve(*arguments: Any) -> None:
        replaced.append(arguments)
        sys.exit(0)

    monkeypatch.setattr(os, "execve", execve)
    told = dylora("container")
    ((program, command, environment),) = replaced
    assert program == sys.executable and environment["HF_TOKEN"] == token and "HF_TOKEN" not in os.environ
    assert token not in told.out + told.err + " ".join(command) and "HF_TOKEN" in told.err
    assert all(token not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_without_a_recipe_it_says_what_to_do(dylora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYLORA_RECIPE", raising=False)
    told = dylora("container")
    assert told.code == 1 and "`dylora submit vertex` sets it" in told.err
