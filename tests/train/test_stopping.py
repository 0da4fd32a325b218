"""A signal at any moment leads to a checkpoint of the step reached, and the run goes on as if none had come."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.whole import HARD, outcome

from dylora_moe.config import RunConfig
from dylora_moe.errors import RunError
from dylora_moe.run_dir import RunDir
from dylora_moe.train import evaluator, fitting, keeper
from dylora_moe.train import session as session_module
from dylora_moe.train.run import train
from dylora_moe.train.session import build_trainer
from dylora_moe.train.stopping import EXIT_CODE, Stopped, StopSignals
from dylora_moe.train.trainer import RoutedTrainer


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tiny_rows: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves that nothing stops."""
    from tests.tiny import settings

    from dylora_moe.config import make_config

    config = make_config(settings(tiny_base, tiny_rows, tmp_path_factory.mktemp("runs")) | HARD)
    train(config)
    return outcome(RunDir(config.run_dir))


def signal_in(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal at the so many-th call of a function, which then goes on."""
    function, calls = getattr(owner, name), []

    def sending(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    patch.setattr(owner, name, sending)


def steps_kept(config: RunConfig) -> int:
    folders = sorted((config.run_dir / "checkpoints").glob("step-*"))
    return int(folders[-1].name[5:11]) if folders else -1


PLACES = {
    "before anything": (session_module, "load_base", 1, -1),
    "answers before": (fitting, "generate_answers", 1, -1),
    "measuring before": (evaluator, "evaluate_domains", 1, -1),
    "first step": (RoutedTrainer, "compute_loss", 1, 0),
    "first pass of a step": (RoutedTrainer, "compute_loss", 3, 1),
    "last pass of a step, whose end it lives to see": (RoutedTrainer, "compute_loss", 10, 5),
    "step after an evaluation": (RoutedTrainer, "compute_loss", 13, 6),
    "an evaluation": (evaluator, "evaluate_domains", 2, 6),
    "saving": (keeper, "save_optimizer", 1, 3),
    "saving after an evaluation": (keeper, "save_optimizer", 2, 6),
    "the last evaluation": (evaluator, "evaluate_domains", 4, 13),
    "saving the last step": (keeper, "save_optimizer", 5, 13),
    "answers after": (fitting, "generate_answers", 2, 13),
    "writing the model": (fitting, "save_model", 1, 13),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_signal_costs_no_step(
    tiny_config: Callable[..., RunConfig], whole: dict[str, Any], place: str, number: signal.Signals
) -> None:
    owner, name, call, step = PLACES[place]
    config = tiny_config(**HARD)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match=number.name), StopSignals() as stop:
        signal_in(patch, owner, name, call, number)
        train(config, stop=stop)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert steps_kept(config) == step
    train(config)
    assert outcome(RunDir(config.run_dir)) == whole


def test_many_signals_cost_no_step(tiny_config: Callable[..., RunConfig], whole: dict[str, Any]) -> None:
    config = tiny_config(**HARD)
    stops = 0
    for call in (1, 2, 3, 1, 5, 4, 7):
        with pytest.MonkeyPatch.context() as patch, StopSignals() as stop:
            signal_in(patch, RoutedTrainer, "compute_loss", call)
            signal_in(patch, evaluator, "evaluate_domains", 2)
            try:
                train(config, stop=stop)
            except Stopped:
                stops += 1
    train(config)
    assert stops >= 6 and outcome(RunDir(config.run_dir)) == whole


def test_an_evaluation_that_would_stop_early_is_made_first(tiny_config: Callable[..., RunConfig]) -> None:
    """Stopped in the evaluation that ends the run early, it goes on with that evaluation and then takes no step."""
    early = {**HARD, "early_stopping_patience": 1, "eval_steps": 2, "learning_rate": 1e-9, "max_steps": 50}
    train(tiny_config(**early, run_name="whole"))
    config = tiny_config(**early, run_name="stopped")
    expected = outcome(RunDir(config.output_dir / "whole"))
    last = expected["result"]["steps"]
    assert 2 < last < 50
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped), StopSignals() as stop:
        signal_in(patch, evaluator, "evaluate_domains", 1 + last // 2)
        train(config, stop=stop)
    train(config)
    assert outcome(RunDir(config.run_dir)) == expected


def run_dylora(recipe: Path, **options: Any) -> "subprocess.Popen[str]":
    code = "import torch; torch.set_num_threads(1); from dylora_moe.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, "train", str(recipe)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


@pytest.fixture
def recipe(tiny_settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """Of a run that takes long."""
    values = tiny_settings(**{**HARD, "max_steps": 100_000, "num_epochs": 100_000, "save_steps": 2})
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values, default=str))
    return path


def test_the_exit_code_asks_for_a_restart(recipe: Path, tmp_path: Path) -> None:
    process = run_dylora(recipe)
    wait_for(tmp_path / "runs/tiny/checkpoints/step-000004", process)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 75
    assert "SIGTERM: stopping after a checkpoint" in text and "The same command goes on" in text
    assert not (tmp_path / "runs/tiny/.lock.json").exists()


def test_a_second_sigint_ends_at_once(recipe: Path, tmp_path: Path) -> None:
    process = run_dylora(recipe)
    wait_for(tmp_path / "runs/tiny/checkpoints/step-000004", process)
    os.kill(process.pid, signal.SIGSTOP)  # so that both come before the next poll
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    assert process.returncode in (-signal.SIGINT, EXIT_CODE)


def test_a_signal_to_the_whole_group_costs_no_step(recipe: Path, tmp_path: Path) -> None:
    """As some schedulers send it: the processes that prepare batches get it, too."""
    values = json.loads(recipe.read_text()) | {"dataloader_num_workers": 2}
    recipe.write_text(json.dumps(values))
    process = run_dylora(recipe, start_new_session=True)
    wait_for(tmp_path / "runs/tiny/checkpoints/step-000004", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, text
    assert text.count("stopping after a checkpoint") == 1


def test_workers_take_no_signals(make_session: Callable[..., Any]) -> None:
    """The death of one would be an error in the main process at any moment, that of an update, too."""
    trainer = build_trainer(make_session(dataloader_num_workers=1), stop=StopSignals(), tell=print)
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        assert worker.pid is not None
        os.kill(worker.pid, number)
    worker.join(0.5)
    assert worker.is_alive() and len(list(batches)) > 1
    del batches


def test_a_worker_that_dies_of_a_signal_that_came_is_a_stop(
    tiny_config: Callable[..., RunConfig], whole: dict[str, Any]
) -> None:
    config = tiny_config(**HARD)
    compute = RoutedTrainer.compute_loss

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Terminated.")
        return compute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="SIGTERM"), StopSignals() as stop:
        patch.setattr(RoutedTrainer, "compute_loss", dying)
        train(config, stop=stop)
    assert steps_kept(config) == 4
    train(config)
    assert outcome(RunDir(config.run_dir)) == whole


def test_an_error_in_a_step_costs_no_step_before_it(
    tiny_config: Callable[..., RunConfig], whole: dict[str, Any]
) -> None:
    config = tiny_config(**HARD)
    compute = RoutedTrainer.compute_loss

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise RuntimeError("something else")
        return compute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="something else"):
        patch.setattr(RoutedTrainer, "compute_loss", failing)
        train(config)
    assert steps_kept(config) == 5
    train(config)
    assert outcome(RunDir(config.run_dir)) == whole


def test_an_update_that_fails_is_never_kept(tiny_config: Callable[..., RunConfig], whole: dict[str, Any]) -> None:
    """Some weights have changed and others not: the checkpoint before is what counts."""
    import torch

    config, made = tiny_config(**HARD), []
    step = torch.optim.AdamW.step

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(step(self, *args, **kwargs))
        if len(made) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="The optimizer must fit into memory"):
        patch.setattr(torch.optim.AdamW, "step", failing)
        train(config)
    assert steps_kept(config) == 3
    train(config)
    assert outcome(RunDir(config.run_dir)) == whole


@pytest.mark.parametrize("owner, name", [(RunDir, "copy_from"), (RunDir, "clear"), (fitting, "view_data")])
def test_a_signal_while_the_folder_is_filled_costs_nothing(
    tiny_config: Callable[..., RunConfig], whole: dict[str, Any], owner: Any, name: str
) -> None:
    config = tiny_config(**HARD)
    if name == "copy_from":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped), StopSignals() as stop:
            signal_in(patch, RoutedTrainer, "compute_loss", 7)
            train(config, stop=stop)
    writing = RunDir.write
    for call in range(1, 4):
        calls: list[str] = []

        def sending(self: Any, file: str, content: Any, calls: list[str] = calls, call: int = call) -> None:
            calls.append(file)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            writing(self, file, content)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped), StopSignals() as stop:
            patch.setattr(RunDir, "write", sending)
            train(config, stop=stop)
    train(config)
    assert outcome(RunDir(config.run_dir)) == whole
