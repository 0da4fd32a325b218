"""A run that was killed and started again ends as one that was not: weights, router and metrics bit for bit."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.damages import DAMAGES
from tests.train.whole import HARD, outcome, start

from dylora_moe.config import RunConfig, make_config
from dylora_moe.errors import RunError
from dylora_moe.run_dir import RunDir
from dylora_moe.train import fitting
from dylora_moe.train.checkpoint import find_newest
from dylora_moe.train.run import train


class Stop(Exception):
    """Stands for whatever ends a process in the middle of a step."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stop in the middle of this step, counted from the start of the run."""
    from dylora_moe.train.trainer import RoutedTrainer

    compute = RoutedTrainer.compute_loss

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= step:
            raise Stop
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(RoutedTrainer, "compute_loss", stopping)


@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": True}, {"num_experts": 1, "lora_r": 4}, {"granularity": "token", "top_k": 2}],
    ids=["joint", "packed", "single", "token"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(tiny_config: Callable[..., RunConfig], changes: dict[str, Any]) -> None:
    whole = tiny_config(**HARD | changes, run_name="whole")
    train(whole)
    config = tiny_config(**HARD | changes, run_name="stopped")
    for step in (1, 4, 5, 9, 12):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, step)
            train(config)
    train(config)
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(whole.run_dir))
    assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == ["step-000012", "step-000013"]


def test_a_run_that_stopped_behind_its_last_step_only_ends(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an evaluation at the last step, which is not made and written a second time."""
    whole = tiny_config(**HARD | {"max_steps": 12}, run_name="whole")
    train(whole)
    config = whole.model_copy(update={"run_name": "stopped"})

    def stopping(*args: Any, **kwargs: Any) -> None:
        raise Stop

    for name in ("_result", "save_model"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(fitting, name, stopping)
            train(config)
    stop_at(monkeypatch, 0)  # no step is made again
    train(config)
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(whole.run_dir))


def test_what_is_killed_goes_on_too(tiny_settings: Callable[..., dict[str, Any]]) -> None:
    """By SIGKILL, wherever the process is: while it starts, measures, steps or saves."""
    values = json.loads(json.dumps(tiny_settings(**HARD), default=str))
    train(make_config({**values, "run_name": "whole"}))
    config = make_config({**values, "run_name": "killed"})
    metrics = config.run_dir / "metrics.jsonl"
    draw = random.Random(0)
    kills = 0
    for lines in (1, 2, 4):  # so that each process gets on, and each dies somewhere else
        process = start(config)
        while process.poll() is None and (not metrics.is_file() or metrics.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    assert start(config).wait() == 0
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(config.output_dir / "whole"))


@pytest.fixture
def stopped(tiny_config: Callable[..., RunConfig]) -> RunConfig:
    """The settings of a run that stopped in its fifth step, with a checkpoint of the third."""
    config = tiny_config(**HARD)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 4)
        train(config)
    return config


def content(config: RunConfig) -> dict[str, bytes]:
    return {
        path.relative_to(config.run_dir).as_posix(): path.read_bytes()
        for path in config.run_dir.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"learning_rate": 1e-3}, r"other settings: learning_rate .* there, 0\.001 here"),
        ({"max_steps": 14}, "max_steps 13 there, 14 here"),
        ({"resume": "never"}, "did not finish"),
    ],
)
def test_settings_that_would_make_another_run_are_refused(
    stopped: RunConfig, change: dict[str, Any], text: str
) -> None:
    before = content(stopped)
    with pytest.raises(RunError, match=text):
        train(stopped.model_copy(update=change))
    assert content(stopped) == before


def test_settings_that_change_no_figure_are_accepted(stopped: RunConfig) -> None:
    result = train(stopped.model_copy(update={"logging_steps": 1, "save_steps": 5, "save_total_limit": 1}))
    assert result["steps"] == 13
    assert [path.name for path in (stopped.run_dir / "checkpoints").iterdir()] == ["step-000013"]


def test_changed_data_is_refused(stopped: RunConfig) -> None:
    first: Any = stopped.datasets[0]
    path = Path(first["path"])
    other = stopped.output_dir / "other" / path.name
    other.parent.mkdir()
    other.write_text(path.read_text().replace("red", "rosy"))
    stored = stopped.run_dir / "config.yaml"
    stored.write_text(stored.read_text().replace(str(path), str(other)))
    changed = stopped.model_copy(update={"datasets": ({**first, "path": str(other)}, *stopped.datasets[1:])})
    before = content(stopped)
    with pytest.raises(RunError, match="The data must be what the run"):
        train(changed)
    assert content(stopped) == before


def test_a_run_without_a_sound_checkpoint_begins_again(stopped: RunConfig) -> None:
    (stopped.run_dir / "checkpoints" / "step-000003" / "weights.safetensors").write_bytes(b"")
    train(stopped)
    whole = stopped.model_copy(update={"run_name": "whole"})
    train(whole)
    assert outcome(RunDir(stopped.run_dir)) == outcome(RunDir(whole.run_dir))


@pytest.fixture
def checkpoint(stopped: RunConfig) -> Path:
    return stopped.run_dir / "checkpoints" / "step-000003"


def test_a_checkpoint_goes_on_in_another_folder(
    tiny_config: Callable[..., RunConfig], stopped: RunConfig, checkpoint: Path, tmp_path: Path
) -> None:
    """With the lines of metrics up to there; the run it is of may be gone, and so may the process, and again."""
    before = content(stopped)
    moved = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, moved)
    config = tiny_config(**HARD, run_name="other", resume=str(moved))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 7)
        train(config)
    shutil.rmtree(moved)
    train(config)
    train(whole := tiny_config(**HARD, run_name="whole"))
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(whole.run_dir))
    assert content(stopped) == before


def test_a_checkpoint_of_another_run_is_refused(tiny_config: Callable[..., RunConfig], checkpoint: Path) -> None:
    config = tiny_config(**HARD | {"learning_rate": 0.5}, run_name="other", resume=str(checkpoint))
    with pytest.raises(RunError, match=r"learning_rate 0\.01 there, 0\.5 here"):
        train(config)
    assert set(content(config)) <= {".lock"}


@pytest.mark.parametrize("kind", ["damaged", "missing", "a file"])
def test_what_is_no_sound_checkpoint_is_refused(
    tiny_config: Callable[..., RunConfig], checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "damaged":
        (checkpoint / "loop.safetensors").write_bytes(b"")
    given = {"damaged": checkpoint, "missing": tmp_path / "nothing", "a file": checkpoint / "state.json"}[kind]
    config = tiny_config(**HARD, run_name="other", resume=str(given))
    with pytest.raises(
        RunError, match=r"resume must be auto, never or the folder of a sound checkpoint.*(loop|manifest|not exist)"
    ):
        train(config)
    assert set(content(config)) <= {".lock"}


@pytest.fixture(scope="module")
def made(finished: Any) -> list[str]:
    """The files of a checkpoint as a run makes it."""
    folder = finished[1].path / "checkpoints" / "step-000005"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_each_file_of_a_checkpoint_is_guarded(finished: Any, made: list[str], tmp_path: Path) -> None:
    assert {"weights.safetensors", "optimizer.safetensors", "loop.safetensors", "manifest.json"} <= set(made)
    for name in made:
        for kind, damage in DAMAGES.items():
            folder = shutil.copytree(finished[1].path / "checkpoints", tmp_path / "copy")
            damage(folder / "step-000005" / name)
            told: list[str] = []
            found = find_newest(folder, tell=told.append)
            assert found is not None and found.name == "step-000004", (name, kind)
            assert len(told) == 1 and "step-000005 is not used" in told[0] and Path(name).name in told[0], told
            shutil.rmtree(folder)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_run_falls_back_and_ends_the_same(finished: Any, tmp_path: Path, kind: str) -> None:
    config, run, result = finished
    config = config.model_copy(update={"output_dir": tmp_path})
    shutil.copytree(run.path, config.run_dir)
    (config.run_dir / "result.json").unlink()
    DAMAGES[kind](config.run_dir / "checkpoints" / "step-000005" / "optimizer.safetensors")
    again = train(config)
    assert again["after"]["mean_loss"] == result["after"]["mean_loss"]
    assert outcome(RunDir(config.run_dir))["weights"] == outcome(run)["weights"]
