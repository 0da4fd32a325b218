"""Runs with a remote folder: the local disk may be lost at any moment, and the result is that of a run left alone."""

import errno
import io
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.damages import DAMAGES
from tests.remote.faults import Failing, failing
from tests.remote.s3 import s3
from tests.remote.test_snapshots import files_of
from tests.train import streams
from tests.train.streams import beside
from tests.train.test_resume import Stop, stop_at
from tests.train.whole import HARD, outcome, start

from dylora_moe.config import RunConfig, make_config
from dylora_moe.config.presets import Machine
from dylora_moe.errors import ConfigError, RunError
from dylora_moe.remote import place
from dylora_moe.remote.lease import Lease
from dylora_moe.remote.place import Place
from dylora_moe.remote.snapshots import Snapshots
from dylora_moe.run_dir import RunDir
from dylora_moe.train import continual, folder, mirror
from dylora_moe.train.checkpoint import write_checkpoint
from dylora_moe.train.mirror import Mirror, how_far
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.trainer import RoutedTrainer

__all__ = ["failing", "s3"]


class Told:
    """Keeps what a person is told."""

    def __init__(self) -> None:
        self._file = io.StringIO()
        self.stages = Stages(console=Console(file=self._file, width=1000))

    @property
    def text(self) -> str:
        return self._file.getvalue()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run leaves that has no remote folder and no stop."""
    from tests.tiny import settings

    config = make_config(settings(tiny_base, tiny_rows, tmp_path_factory.mktemp("alone")) | HARD)
    train(config)
    return outcome(RunDir(config.run_dir))


@pytest.fixture
def config(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    return tiny_config(**HARD, remote_dir=f"file://{tmp_path / 'remote'}")


def at(scheme: str, request: pytest.FixtureRequest, config: RunConfig) -> RunConfig:
    """The same run with another kind of remote folder."""
    if scheme == "file":
        return config
    parent = request.getfixturevalue("s3") if scheme == "s3" else "memory://runs"
    return config.model_copy(update={"remote_dir": f"{parent}/{os.urandom(4).hex()}"})


def there(config: RunConfig) -> Snapshots:
    return Snapshots(Place(f"{config.remote_dir}/{config.run_name}"))


def stopped(config: RunConfig, step: int, stages: Stages | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, step)
        train(config, stages)


@pytest.mark.parametrize("scheme", ["file", "memory", "s3"])
def test_the_disk_may_be_lost(
    scheme: str, request: pytest.FixtureRequest, config: RunConfig, alone: Any, told: Told
) -> None:
    config = at(scheme, request, config)
    for step in (1, 4, 9, 12):
        stopped(config, step)
        shutil.rmtree(config.run_dir)
    train(config, told.stages)
    assert outcome(RunDir(config.run_dir)) == alone
    assert "Fetched" in told.text and "Going on from step-000012" in told.text and "has all of the run" in told.text
    assert not (config.run_dir / ".remote").exists() and there(config).place.list("") == {}
    shutil.rmtree(config.run_dir)
    assert train(config)["already_finished"]
    assert outcome(RunDir(config.run_dir)) == alone
    if scheme == "s3":
        secret = os.environ["AWS_SECRET_ACCESS_KEY"]
        assert secret not in told.text
        assert not any(secret.encode() in content for content in files_of(config.run_dir).values())


def test_a_damaged_checkpoint_there_is_passed_over(config: RunConfig, alone: Any, told: Told) -> None:
    stopped(config, 10)
    shutil.rmtree(config.run_dir)
    snapshot = there(config).read(there(config).names()[0])
    newest = max(path for path in snapshot.files if path.endswith("weights.safetensors"))
    remote = Path(str(config.remote_dir).removeprefix("file://")) / config.run_name
    DAMAGES["cut off"](remote / "objects" / snapshot.files[newest].sha256)
    train(config, told.stages)
    assert f"The checkpoint {newest.rpartition('/')[0]}" in told.text and "is not used" in told.text
    assert outcome(RunDir(config.run_dir)) == alone


# How many operations reach the remote folder before the machine dies or the network goes: the lease, the first
# objects, a checkpoint in the middle, its record, what is deleted, later checkpoints.
@pytest.mark.parametrize("kind", ["error", "cut"])
@pytest.mark.parametrize("at", [8, 14, 25, 33, 60, 110])
def test_each_fault_on_the_way_leaves_what_to_go_on_from(
    at: int, kind: str, config: RunConfig, alone: Any, tmp_path: Path, failing: type[Failing], monkeypatch: Any
) -> None:
    monkeypatch.setattr(mirror, "GRACE_S", 0.1)
    config = config.model_copy(update={"remote_dir": f"failing://{tmp_path / 'remote'}"})
    failing.plan(at, kind, until=10**9)
    stopped(config, 11)
    shutil.rmtree(config.run_dir)
    failing.plan(0)
    (tmp_path / "remote" / config.run_name / "writer.json").unlink(missing_ok=True)  # of this process, as if gone
    train(config)
    assert outcome(RunDir(config.run_dir)) == alone


def test_a_network_that_comes_back_is_no_matter(
    config: RunConfig, alone: Any, tmp_path: Path, failing: type[Failing], told: Told
) -> None:
    config = config.model_copy(update={"remote_dir": f"failing://{tmp_path / 'remote'}"})
    failing.plan(12, until=14)
    train(config, told.stages)
    assert outcome(RunDir(config.run_dir)) == alone
    assert told.text.count("cannot be written (ConnectionError") == 1 and "can be written again" in told.text
    shutil.rmtree(config.run_dir)
    assert train(config)["already_finished"] and outcome(RunDir(config.run_dir)) == alone


def test_without_a_network_training_ends_and_the_command_fails(
    config: RunConfig, alone: Any, tmp_path: Path, failing: type[Failing], monkeypatch: Any
) -> None:
    monkeypatch.setattr(mirror, "END_S", 0.3)
    config = config.model_copy(update={"remote_dir": f"failing://{tmp_path / 'remote'}"})
    failing.plan(8, until=10**9)
    with pytest.raises(RunError, match="lacks the last of it: ConnectionError: the network is away"):
        train(config)
    assert outcome(RunDir(config.run_dir)) == alone
    failing.plan(0)
    (tmp_path / "remote" / config.run_name / "writer.json").unlink()
    assert train(config)["already_finished"]
    shutil.rmtree(config.run_dir)
    assert train(config)["already_finished"]


def test_a_disk_without_room_for_images_stops_no_training(
    config: RunConfig, alone: Any, told: Told, monkeypatch: Any
) -> None:
    """And nobody is told that all is there."""

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mirror, "stage", full)
    with pytest.raises(RunError, match=r"lacks the last of it: OSError: .*No space left"):
        train(config, told.stages)
    assert outcome(RunDir(config.run_dir)) == alone
    assert told.text.count("No space left") == 1 and "has all of the run" not in told.text


def test_a_run_folder_that_vanishes_is_told_and_not_mirrored(config: RunConfig, told: Told) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="The checkpoint of step 3 must be"):
        step = RoutedTrainer.training_step

        def deleting(self: RoutedTrainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                shutil.rmtree(config.run_dir, ignore_errors=True)
            return step(self, *args, **kwargs)

        patch.setattr(RoutedTrainer, "training_step", deleting)
        train(config, told.stages)
    assert there(config).names() == [] and "lacks the last of it: FileNotFoundError" in told.text


def test_what_is_ending_by_an_error_sends_the_rest_though_it_is_told_to_end(
    config: RunConfig, alone: Any, monkeypatch: Any
) -> None:
    """As the launcher of several processes tells all of them, once one has ended."""
    push = Mirror.push

    def told_to_end(self: Mirror, seconds: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        push(self, seconds)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop), StopSignals() as stop:
        patch.setattr(Mirror, "push", told_to_end)
        stop_at(patch, 4)
        train(config, stop=stop)
    shutil.rmtree(config.run_dir)
    train(config)
    assert outcome(RunDir(config.run_dir)) == alone


def test_a_remote_folder_in_the_run_folder_is_refused(config: RunConfig) -> None:
    for remote in (config.output_dir, config.run_dir / "remote"):
        with pytest.raises(ConfigError, match="remote_dir must not be where runs work"):
            train(config.model_copy(update={"remote_dir": f"file://{remote}"}))


def test_a_remote_folder_that_cannot_be_reached_ends_it_before_work(
    config: RunConfig, tmp_path: Path, failing: type[Failing], monkeypatch: Any
) -> None:
    monkeypatch.setattr(place, "_PAUSES_S", (0.01,))
    failing.plan(1, until=10**9)
    with pytest.raises(RunError, match="must be a remote folder that can be read and written now"):
        train(config.model_copy(update={"remote_dir": f"failing://{tmp_path / 'remote'}"}))


def test_a_run_that_is_ended_early_sends_the_rest(config: RunConfig, told: Told) -> None:
    stopped(config, 4, told.stages)
    assert "has all of the run" in told.text
    newest = there(config).read(there(config).names()[0])
    assert any(path.startswith("checkpoints/step-000004/") for path in newest.files)


def test_how_far_a_stream_is(tmp_path: Path) -> None:
    """Each moment of a stream is further than the one before; so is one that was taken back."""
    run, moments = RunDir(tmp_path), list[tuple[int, ...]]()
    for number in (1, 2):
        stage = RunDir(tmp_path / "stages" / f"0{number}-skill")
        moments.append(how_far(run))
        stage.write("decision.json", "{}")
        moments.append(how_far(run))
        for step in (9, 10):
            write_checkpoint(stage / "checkpoints", step, lambda folder: (folder / "file").touch())
            moments.append(how_far(run))
        stage.write("result.json", "{}")
        moments.append(how_far(run))
        stage.write("stage.json", "{}")
    run.write("result.json", "{}")
    moments.append(how_far(run))
    (tmp_path / "undone" / "1").mkdir(parents=True)
    os.replace(tmp_path / "stages", tmp_path / "undone" / "1" / "stages")
    moments.append(how_far(run))
    assert sorted(set(moments)) == moments


def test_what_is_further_is_gone_on_with(config: RunConfig, tmp_path: Path, alone: Any, told: Told) -> None:
    """Two machines in turn: each has what the other has done."""
    other = config.model_copy(update={"output_dir": tmp_path / "other"})
    stopped(config, 4)
    stopped(other, 10)
    stopped(config, 12, told.stages)
    assert "Fetched" in told.text and "Going on from step-000010" in told.text
    local = Told()
    train(config, local.stages)
    assert "Fetched" not in local.text and "Going on from step-000012" in local.text
    assert outcome(RunDir(config.run_dir)) == alone
    train(other)
    assert outcome(RunDir(other.run_dir))["weights"] == alone["weights"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"learning_rate": 1e-3}, r"holds a run with other settings: learning_rate 0\.01 there, 0\.001 here"),
        ({"resume": "never"}, "holds a run that did not finish, and resume is never"),
    ],
)
def test_another_run_there_is_refused(config: RunConfig, tmp_path: Path, change: dict[str, Any], text: str) -> None:
    stopped(config, 4)
    before = files_of(tmp_path / "remote")
    with pytest.raises(RunError, match=text):
        train(config.model_copy(update={"output_dir": tmp_path / "other", **change}))
    assert files_of(tmp_path / "remote") == before
    assert not set(files_of(tmp_path / "other")) - {"tiny/.lock"}


def test_what_is_not_this_run_here_is_neither_replaced_nor_sent(
    config: RunConfig, tmp_path: Path, stream: Callable[..., RunConfig]
) -> None:
    stopped(config, 4)
    remote = files_of(tmp_path / "remote")
    others = {
        "notes": config.model_copy(update={"output_dir": tmp_path / "notes"}),
        "another run": config.model_copy(update={"output_dir": tmp_path / "another"}),
        "notes of a stream": stream(output_dir=str(tmp_path / "streams"), remote_dir=config.remote_dir),
    }
    stopped(others["another run"].model_copy(update={"remote_dir": None, "seed": 5}), 2)
    for kind, other in others.items():
        other.run_dir.mkdir(parents=True, exist_ok=True)
        (other.run_dir / "notes.txt").write_text("mine")
        before = files_of(other.run_dir)
        before.pop(".lock", None)
        with pytest.raises(RunError, match=r"must be new or hold this run.*(it is no run|seed 5 there, 0 here)"):
            train(other)
        assert {name: content for name, content in files_of(other.run_dir).items() if name != ".lock"} == before, kind
        assert files_of(tmp_path / "remote") == remote, kind


def test_a_stream_whose_start_failed_may_be_corrected(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    """As without a remote folder: nothing of it is to be gone on from, so nothing of it is sent."""
    config = stream(remote_dir=f"file://{tmp_path / 'remote'}")
    wrong = config.model_copy(update={"learning_rate": 0.5})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(streams.Stop):
        streams.stop_at(patch, continual, "open_stream", 1)
        train(wrong)
    assert there(config).names() == []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(streams.Stop):
        streams.stop_at(patch, continual, "make_evaluator", 1)
        train(config)
    assert len(there(config).names()) == 1


def test_the_preset_is_that_of_the_machine_that_began(config: RunConfig, monkeypatch: Any) -> None:
    stopped(config, 4)
    card = Machine(device_name="Tesla T4", memory_bytes=15 * 10**9, kind="cuda", has_bf16=False)
    shutil.rmtree(config.run_dir)
    monkeypatch.setattr(folder, "this_machine", lambda: card)
    assert config.preset == "auto"
    assert folder.settle_here(config).preset == "cpu"
    assert folder.settle_here(config.model_copy(update={"remote_dir": None})).preset == "t4"


def test_two_machines_at_once_are_refused(config: RunConfig, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(mirror, "Lease", partial(Lease, patience_s=8))
    holder = Lease(there(config).place, print, beat_s=0.05)
    holder.acquire()
    with pytest.raises(RunError, match="must have one writer at a time"):
        train(config)
    assert list(there(config).place.list("")) == ["writer.json"]
    holder.release()


def test_a_run_that_was_taken_over_ends(config: RunConfig, monkeypatch: Any) -> None:
    """At the next checkpoint, which it keeps; what the other one wrote stays."""
    monkeypatch.setattr(mirror, "Lease", partial(Lease, beat_s=0.01))
    opened = Mirror.open

    def taken(self: Mirror) -> None:
        opened(self)
        for _ in range(3):
            self._snapshots.place.write("writer.json", b'{"token": "other", "host": "far-away", "process": 1}')
            time.sleep(0.1)

    monkeypatch.setattr(Mirror, "open", taken)
    with pytest.raises(RunError, match="process 1 on far-away has taken it over"):
        train(config)
    assert (config.run_dir / "checkpoints").is_dir() and there(config).names() == []
    assert not (config.run_dir / "result.json").exists()


@pytest.mark.parametrize("moment", ["cleared", "half moved"])
def test_fetching_may_be_interrupted(config: RunConfig, alone: Any, tmp_path: Path, moment: str) -> None:
    """Where the fetched files take the place of those that were there."""
    stopped(config, 10)
    other = config.model_copy(update={"output_dir": tmp_path / "other"})
    stopped(other.model_copy(update={"remote_dir": None}), 4)
    act = os.replace

    def replace_files(source: Any, target: Any) -> None:
        if "/fetched/" in str(source) and (moment == "cleared" or Path(source).name == "config.yaml"):
            raise Stop
        act(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(mirror.os, "replace", replace_files)
        train(other)
    assert (other.run_dir / ".remote" / "replacing").exists()
    train(other)
    assert outcome(RunDir(other.run_dir)) == alone


@pytest.fixture(scope="module")
def whole_stream(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = streams.make_stream(tiny_base, tiny_rows, tmp_path_factory.mktemp("streams"), run_name="whole")
    train(config)
    return config, RunDir(config.run_dir)


def test_a_stream_may_lose_its_disk(whole_stream: Any, tmp_path: Path) -> None:
    """Between any of the things that a stage does, and while it trains."""
    config = beside(whole_stream, "lost", remote_dir=f"file://{tmp_path / 'remote'}")
    for name, times in (("fit", 1), ("make_evaluator", 1), ("fit", 1), ("measure_stage", 1), ("fit", 1)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(streams.Stop):
            streams.stop_at(patch, continual, name, times)
            train(config)
        shutil.rmtree(config.run_dir)
    train(config)
    assert streams.outcome(RunDir(config.run_dir)) == streams.outcome(whole_stream[1])


def test_a_stream_taken_back_is_not_brought_forward(whole_stream: Any, tmp_path: Path) -> None:
    """What was undone by hand is undone there, too."""
    from dylora_moe.train.stream_result import rollback

    config = beside(whole_stream, "back", remote_dir=f"file://{tmp_path / 'remote'}")
    train(config)
    before = how_far(RunDir(config.run_dir))
    rollback(config.run_dir, "sums")
    assert how_far(RunDir(config.run_dir)) > before
    shorter = config.model_copy(update={"skills": config.skills[:-1]})
    assert len(train(shorter)["stages"]) == 2
    shutil.rmtree(config.run_dir)
    assert len(train(shorter)["stages"]) == 2 and (config.run_dir / "undone").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_what_is_killed_on_a_lost_machine_goes_on(
    scheme: str, request: pytest.FixtureRequest, config: RunConfig, alone: Any
) -> None:
    """By SIGKILL, in processes of their own; the disk is lost with the first."""
    config = at(scheme, request, config)
    draw, lost = random.Random(scheme), [True, False]
    for count, lose in enumerate(lost, 1):
        process = start(config)
        while process.poll() is None and _newest(config) < 4 * count:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        if lose:
            shutil.rmtree(config.run_dir)
    train(config)
    assert outcome(RunDir(config.run_dir)) == alone


def _newest(config: RunConfig) -> int:
    """The step of the newest line of metrics."""
    lines = RunDir(config.run_dir).read_lines("metrics.jsonl")
    return max((line["step"] for line in lines), default=-1)
