"""A whole run with trackers and watched for signs: across stops, and when a tracker fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.whole import HARD, outcome

from dylora_moe.config import RunConfig
from dylora_moe.errors import ConfigError
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train
from dylora_moe.train.stopping import Stopped
from dylora_moe.train.trainer import RoutedTrainer

pytest.importorskip("tensorboard", reason="needs the extra `trackers`")


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    compute = RoutedTrainer.compute_loss

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Stopped
        return compute(self, *args, **kwargs)

    patch.setattr(RoutedTrainer, "compute_loss", stopping)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_tracker_has_every_figure_once_across_stops(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(**HARD, report_to=["tensorboard"])
    for step in (4, 8, 11):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, step)
            train(config)
    train(config)
    (folder,) = {path.parent for path in (config.run_dir / "trackers").rglob("*tfevents*")}
    found = read_events(folder)
    lines = RunDir(config.run_dir).read_lines("metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluations = [(line["step"], line["eval_sums_loss"]) for line in lines if "eval_loss" in line]
    assert [step for step, _ in found["train/loss"]] == [step for step, _ in losses] == [4, 8, 12]
    assert [value for _, value in found["train/loss"]] == pytest.approx([value for _, value in losses])
    assert [value for _, value in found["eval/sums_loss"]] == pytest.approx([value for _, value in evaluations])
    assert {"router/load_entropy", "train/grad_norm", "train/tokens_per_second", "train/memory_gb"} <= found.keys()
    train(whole := tiny_config(**HARD, run_name="whole"))
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(whole.run_dir))


def test_a_tracker_that_fails_stops_nothing(
    tiny_config: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from dylora_moe.train.session import Stages

    config = tiny_config(report_to=["tensorboard"])
    config.run_dir.parent.mkdir(parents=True)
    begin = RoutedTrainer.train_from

    def block(self: Any, folder: Path | None) -> None:
        """The tracker's folder becomes one that nobody can write to."""
        import shutil

        shutil.rmtree(config.run_dir / "trackers")
        (config.run_dir / "trackers").write_text("in the way")
        begin(self, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoutedTrainer, "train_from", block)
        result = train(config, Stages(console=Console()))
    assert result["steps"] == 4 and (config.run_dir / "final" / "dylora_moe.json").exists()
    train(plain := tiny_config(run_name="plain"))
    assert outcome(RunDir(config.run_dir))["weights"] == outcome(RunDir(plain.run_dir))["weights"]


def test_a_tracker_that_cannot_be_is_told_before_any_work(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = tiny_config(report_to=["wandb"])
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        train(config)
    assert {path.name for path in config.run_dir.iterdir()} <= {".lock"}


def test_an_artifact_needs_wandb_and_its_key(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        train(tiny_config(wandb_checkpoint_artifact="me/project/name:v0"))


def test_a_checkpoint_that_is_an_artifact_is_gone_on_from(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """W&B's server cannot be here: what downloads from it is replaced by a copy of the same files."""
    import shutil

    from dylora_moe.train import run as run_module

    first = tiny_config(**HARD, run_name="first")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 7)
        train(first)
    asked: list[str] = []

    def download(reference: str, into: Path) -> Path:
        asked.append(reference)
        return Path(shutil.copytree(first.run_dir / "checkpoints" / "step-000006", into / "step-000006"))

    monkeypatch.setattr(run_module, "fetch_checkpoint", download)
    config = tiny_config(**HARD, run_name="second", wandb_checkpoint_artifact="me/project/name:v0")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 10)
        train(config)
    train(config)  # from its own checkpoint
    assert asked == ["me/project/name:v0"]
    train(whole := tiny_config(**HARD, run_name="whole"))
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(whole.run_dir))


def test_a_sign_is_told_and_kept(tiny_config: Callable[..., RunConfig]) -> None:
    """A rate far too low: the loss stands still, and the run says so while it goes on."""
    config = tiny_config(max_steps=80, num_epochs=100, logging_steps=1, learning_rate=1e-9, batch_size=18)
    train(config)
    warnings = RunDir(config.run_dir).read_lines("warnings.jsonl")
    assert warnings and all({"step", "name", "seen", "advice"} <= warning.keys() for warning in warnings)
    assert any("learning_rate" in warning["advice"] for warning in warnings)
