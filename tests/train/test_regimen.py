"""When a run evaluates, which weights it ends with, when it stops early, and which step sizes it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.whole import HARD, outcome

from dylora_moe.config import RunConfig
from dylora_moe.errors import ConfigError
from dylora_moe.evaluate.losses import Evaluation
from dylora_moe.run_dir import RunDir
from dylora_moe.train import evaluator
from dylora_moe.train.run import train
from dylora_moe.train.schedules import two_phase
from dylora_moe.train.stopping import Stopped, StopSignals
from dylora_moe.train.trainer import RoutedTrainer


def fake_losses(patch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the evaluations after the first, at the start, give these losses, over and over the last."""
    evaluate = evaluator.evaluate_domains
    left = [None, *values]

    def faked(*args: Any, **kwargs: Any) -> Evaluation:
        found = evaluate(*args, **kwargs)
        value = left.pop(0) if len(left) > 1 else left[0]
        if value is None:
            return found
        return Evaluation(domains=found.domains, mean_loss=value, routing=found.routing)

    patch.setattr(evaluator, "evaluate_domains", faked)


def weights_after(config: RunConfig, steps: int, tmp_path: Path) -> dict[str, Any]:
    """Of the same run, ended after so many steps."""
    shorter = config.model_copy(update={"run_name": f"only-{steps}", "load_best_model_at_end": False})
    shorter = shorter.model_copy(update={"early_stopping_patience": None, "max_steps": steps})
    train(shorter)
    return outcome(RunDir(shorter.run_dir))["weights"]


# A level rate, so that a shorter run takes the same steps.
LEVEL = {"lr_scheduler_type": "constant", "max_steps": 8, "eval_steps": 2, "lora_dropout": 0.1}


def test_a_run_ends_with_the_best_weights(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(**LEVEL, save_total_limit=1)
    with pytest.MonkeyPatch.context() as patch:
        fake_losses(patch, [3.0, 1.0, 2.0, 2.0])
        result = train(config)
    assert result["best_step"] == 4 and result["after"]["mean_loss"] == 1.0 and result["steps"] == 8
    assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    assert outcome(RunDir(config.run_dir))["weights"] == weights_after(config, 4, tmp_path)


def test_or_with_the_last_ones(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(**LEVEL, save_total_limit=1, load_best_model_at_end=False)
    with pytest.MonkeyPatch.context() as patch:
        fake_losses(patch, [3.0, 1.0, 2.0, 2.0])
        assert train(config)["after"]["mean_loss"] == 2.0
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-000008"]
    assert outcome(RunDir(config.run_dir))["weights"] == weights_after(config, 8, tmp_path)


def test_a_best_checkpoint_that_is_damaged_is_not_used(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(**LEVEL)
    taken = RoutedTrainer._take_best

    def damage(self: Any) -> None:
        (config.run_dir / "checkpoints/step-000004/weights.safetensors").write_bytes(b"")
        taken(self)

    with pytest.MonkeyPatch.context() as patch:
        fake_losses(patch, [3.0, 1.0, 2.0, 2.0])
        patch.setattr(RoutedTrainer, "_take_best", damage)
        train(config)
    assert outcome(RunDir(config.run_dir))["weights"] == weights_after(config, 8, tmp_path)


def test_the_metric_may_be_one_domains(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(max_steps=6, eval_steps=1, metric_for_best_model="eval_sums_loss", learning_rate=0.3)
    best = train(config)["best_step"]
    lines = [
        line for line in RunDir(config.run_dir).read_lines("metrics.jsonl") if "eval_loss" in line and line["step"]
    ]
    assert best == min(lines, key=lambda line: line["eval_sums_loss"])["step"]
    with pytest.raises(ConfigError, match=r"must be one of eval_loss, eval_capitals_loss.*'eval_sum_loss'"):
        train(tiny_config(run_name="other", eval_steps=1, metric_for_best_model="eval_sum_loss"))


def test_a_run_stops_when_it_gets_no_better(tiny_config: Callable[..., RunConfig]) -> None:
    early = {**LEVEL, "max_steps": 40, "early_stopping_patience": 3}
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.1, 1.0]
    with pytest.MonkeyPatch.context() as patch:
        fake_losses(patch, losses)
        result = train(tiny_config(**early))
    assert (result["steps"], result["best_step"]) == (14, 8)


@pytest.mark.parametrize("step", [3, 9, 13])
def test_its_patience_survives_a_stop(tiny_config: Callable[..., RunConfig], step: int) -> None:
    early = {**LEVEL, "max_steps": 40, "early_stopping_patience": 3}
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.1, 1.0]
    config = tiny_config(**early)
    compute = RoutedTrainer.compute_loss

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Stopped
        return compute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        fake_losses(patch, losses)
        patch.setattr(RoutedTrainer, "compute_loss", stopping)
        train(config)
    with pytest.MonkeyPatch.context() as patch:
        fake_losses(patch, losses[step // 2 :])
        patch.setattr(evaluator, "evaluate_domains", skip_first_none(evaluator.evaluate_domains))
        result = train(config)
    assert (result["steps"], result["best_step"]) == (14, 8)


def skip_first_none(evaluate: Callable[..., Evaluation]) -> Callable[..., Evaluation]:
    """A run that goes on does not measure the base again: leave out the value that stands for that."""
    state = {"first": True}

    def skipping(*args: Any, **kwargs: Any) -> Evaluation:
        if state.pop("first", False):
            evaluate(*args, **kwargs)
        return evaluate(*args, **kwargs)

    return skipping


def test_a_stopped_run_that_was_over_takes_no_step(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(**{**LEVEL, "max_steps": 40, "early_stopping_patience": 1})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        fake_losses(patch, [5.0, 6.0])
        patch.setattr(RoutedTrainer, "_take_best", lambda self: (_ for _ in ()).throw(Stopped()))
        train(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoutedTrainer, "compute_loss", None)
        result = train(config)
    assert (result["steps"], result["best_step"]) == (4, 2)


def test_an_epoch_may_be_the_interval(tiny_config: Callable[..., RunConfig]) -> None:
    """54 rows by 6 are 9 batches, by two accumulated 5 steps an epoch."""
    config = tiny_config(
        max_steps=None, num_epochs=2, gradient_accumulation_steps=2, eval_steps="epoch", save_steps="epoch"
    )
    train(config)
    run = RunDir(config.run_dir)
    assert [line["step"] for line in run.read_lines("metrics.jsonl") if "eval_loss" in line] == [0, 5, 10]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000005", "step-000010"]


def rates(config: RunConfig) -> list[float]:
    train(config)
    return [
        line["learning_rate"] for line in RunDir(config.run_dir).read_lines("metrics.jsonl") if "learning_rate" in line
    ]


def test_two_phases(tiny_config: Callable[..., RunConfig]) -> None:
    changes = {"lr_scheduler_type": "two_phase", "seeding_ratio": 0.5, "consolidation_factor": 0.25}
    config = tiny_config(**changes, max_steps=10, warmup_ratio=0.2, logging_steps=1, learning_rate=0.01)
    assert rates(config) == pytest.approx([0.0, 0.005, 0.01, 0.01, 0.01, *[0.0025] * 5])


def test_two_phases_of_a_short_run_have_both() -> None:
    multiply = two_phase(num_steps=2, warmup_steps=0, seeding_ratio=0.1, factor=0.5)
    assert [multiply(step) for step in range(3)] == [1.0, 0.5, 0.5]


def test_a_constant_rate_has_no_warm_up(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(lr_scheduler_type="constant", warmup_ratio=0.5, logging_steps=1, learning_rate=0.01)
    assert rates(config) == [0.01] * 4


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "two_phase"])
def test_every_schedule_goes_on_after_a_stop(tiny_config: Callable[..., RunConfig], name: str) -> None:
    whole, config = (tiny_config(**HARD | {"lr_scheduler_type": name}, run_name=run) for run in ("whole", "stopped"))
    train(whole)
    compute = RoutedTrainer.compute_loss

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7:
            raise Stopped
        return compute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RoutedTrainer, "compute_loss", stopping)
        train(config)
    train(config)
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(whole.run_dir))


def test_router_and_experts_have_rates_of_their_own(tiny_config: Callable[..., RunConfig]) -> None:
    seen: list[list[tuple[int, float, float]]] = []
    create = RoutedTrainer.create_optimizer

    def spy(self: Any, *args: Any) -> Any:
        optimizer = create(self, *args)
        groups = optimizer.param_groups
        seen.append([(sum(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in groups])
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoutedTrainer, "create_optimizer", spy)
        train(tiny_config(router_learning_rate=0.5, weight_decay=0.1))
        train(tiny_config(run_name="other", weight_decay=0.1))
        train(tiny_config(run_name="single", num_experts=1, router_learning_rate=0.5))
    experts, router = 3 * 2304, 96
    assert seen[0] == [(experts, 0.01, 0.1), (router, 0.5, 0.1)]
    assert seen[1] == [(experts, 0.01, 0.1), (router, 0.01, 0.1)]
    assert len(seen[2]) == 1


def test_a_router_rate_moves_the_router_alone(make_session: Callable[..., Any]) -> None:

    from dylora_moe.train.session import build_trainer

    moved = []
    for rate in (1e-12, 0.1):
        session = make_session(max_steps=1, router_learning_rate=rate, balance_coefficient=1.0, warmup_ratio=0.0)
        before = {name: value.clone() for name, value in session.model.named_parameters() if value.requires_grad}
        build_trainer(session, stop=StopSignals(), tell=print).train()
        after = dict(session.model.named_parameters())
        moved.append({name: float((after[name] - value).abs().max()) for name, value in before.items()})
    router = next(name for name in moved[0] if name.startswith("routers."))
    assert moved[0][router] < 1e-9 < 0.01 < moved[1][router]
    assert all(moved[0][name] == moved[1][name] > 0 for name in moved[0] if "packed" in name)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_prepared_ahead_are_the_same(tiny_config: Callable[..., RunConfig], workers: int) -> None:
    results = [train(tiny_config(dataloader_num_workers=number, run_name=f"run-{number}")) for number in (0, workers)]
    assert results[0]["after"] == results[1]["after"]


def test_gradients_that_are_no_numbers_leave_the_step_before(tiny_config: Callable[..., RunConfig]) -> None:
    from dylora_moe.errors import RunError

    config = tiny_config(max_steps=9)
    compute = RoutedTrainer.compute_loss

    def spoil(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * torch.inf if self.state.global_step == 5 else loss

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match=r"gradients of step 6 .*6 rows: '###"):
        patch.setattr(RoutedTrainer, "compute_loss", spoil)
        train(config)
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-000005"]
    train(config)
    train(whole := tiny_config(max_steps=9, run_name="whole"))
    assert outcome(RunDir(config.run_dir)) == outcome(RunDir(whole.run_dir))
