"""A dry run: two real steps on the largest batch, an evaluation, a checkpoint and back, measured; nothing is kept."""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from dylora_moe.config import RunConfig
from dylora_moe.data.batching import PlannedBatchSampler
from dylora_moe.data.paths import with_full_paths
from dylora_moe.data.registry import registry_of
from dylora_moe.data.stream import parse_skills
from dylora_moe.errors import ConfigError, RunError
from dylora_moe.run_dir import CHECKPOINTS, FINAL, RunDir
from dylora_moe.train.callbacks.progress import ShowProgress
from dylora_moe.train.checkpoint import find_newest
from dylora_moe.train.fit import Calibration, Plan
from dylora_moe.train.folder import settle_here
from dylora_moe.train.keeper import Checkpoint
from dylora_moe.train.memory import available_memory, peak_memory, restart_peak
from dylora_moe.train.needs import Counts, count_work, largest_batch, plan_memory
from dylora_moe.train.session import Session, Stages, build_trainer, calibrate_router, check_machine, prepare
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.stream import stage_config
from dylora_moe.train.trainer import RoutedTrainer
from dylora_moe.tuner import save_model

# The first step of an optimizer makes its state; the second is as all others are.
_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a run will need. Memory and disk in bytes, times in seconds.

    Attributes:
        plan: Estimate of the memory, and into how many parts batches were split for it.
        available: Memory that the process may hold.
        peak: Memory that it held at most, measured.
        counts: How often the run does what.
        calibration: One step of average size, one evaluation, one save.
        load_s: Reading a checkpoint.
        run_s: The whole run.
        checkpoint: One checkpoint on disk.
        final: The model at the end, on disk.
        disk: The run folder at its largest.
        disk_free: Left on the disk of the run folder.
    """

    plan: Plan
    available: int
    peak: int
    counts: Counts
    calibration: Calibration
    load_s: float
    run_s: float
    checkpoint: int
    final: int
    disk: int
    disk_free: int


def rehearse(config: RunConfig, stages: Stages | None = None, stop: StopSignals | None = None) -> Rehearsal:
    """Try a run out in a folder of its own, which is deleted.

    Raises:
        DyLoraError: What would stop the run, too; or a checkpoint does not come back as it was written.
    """
    stages, stop = stages or Stages(), stop or StopSignals()
    config = settle_here(with_full_paths(config).model_copy(update={"remote_dir": None}))
    check_machine(config)
    if config.mode == "continual":
        config = _first_skill(config, stages)
    disk = next(parent for parent in config.run_dir.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=disk) as folder:
        config = config.model_copy(update={"output_dir": Path(folder), "run_name": "run"})
        run = RunDir(config.run_dir)
        run.path.mkdir()
        set_seed(config.seed)
        session = prepare(config, run, stages)
        trainer = build_trainer(session, stop=stop, tell=stages.tell, callbacks=[ShowProgress(stages.console)])
        return _measure(session, trainer, stages)


def _first_skill(config: RunConfig, stages: Stages) -> RunConfig:
    """What a stream does for one skill that is trained.

    Raises:
        ConfigError: None is.
    """
    skills = parse_skills(config.skills, registry_of(config.data_registry))
    first = next((skill for skill in skills if skill.adapter is None), None)
    if first is None:
        raise ConfigError("a dry run needs a skill to train, and all of them come with an adapter. Train without it.")
    stages.tell(f"A stream is tried out by one skill, {first.name}: time and disk are those of one skill.")
    return stage_config(config, first, RunDir(config.run_dir))


def _measure(session: Session, trainer: RoutedTrainer, stages: Stages) -> Rehearsal:
    config, counts, device = session.config, count_work(session, trainer), session.model.device
    plan, available = plan_memory(session, trainer), available_memory(device)
    trainer.use_plan(plan)
    calibrate_router(session)
    stages.tell("Trying out: an evaluation, two steps on the largest batch, a checkpoint and back.")
    restart_peak(device)
    evaluation_s = _timed(trainer.evaluate)
    clock = _rehearse_steps(trainer)
    peak = peak_memory(device)
    trainer.keeper.mark(trainer)
    save_s = _timed(lambda: trainer.keeper.save(trainer))
    load_s = _timed(lambda: _check_reload(trainer))
    save_model(session.model, session.run / FINAL, base_name=config.base_model, base_revision=None, tokenizer=None)
    largest = largest_batch(trainer)
    tokens = len(largest) * max(trainer.sampler.size(item) for item in largest) * config.gradient_accumulation_steps
    step_s = clock.last_s * counts.step_tokens / tokens
    calibration = Calibration(step_s=step_s, evaluation_s=evaluation_s, save_s=save_s)
    checkpoint, final = _size(session.run / CHECKPOINTS), _size(session.run / FINAL)
    return Rehearsal(
        plan=plan,
        available=available,
        peak=peak,
        counts=counts,
        calibration=calibration,
        load_s=load_s,
        run_s=calibration.run_s(steps=counts.steps, evaluations=counts.evaluations, saves=counts.saves),
        checkpoint=checkpoint,
        final=final,
        disk_free=shutil.disk_usage(session.run.path).free,
        # The best one may stand beside the newest, and a new one is complete before an old one goes.
        disk=min(config.save_total_limit + 2, counts.saves + 1) * checkpoint + final,
    )


class _Clock(TrainerCallback):
    """Seconds of the last step."""

    last_s = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.last_s = time.perf_counter() - self._began


class _Again(PlannedBatchSampler[Any]):
    """One batch, over and over for a whole epoch."""

    def __init__(self, of: PlannedBatchSampler[Any], batch: list[Any]) -> None:
        super().__init__(batch_size=of.batch_size, rank=of.rank, num_ranks=of.num_ranks)
        self._of, self._batch = of, batch

    @property
    def num_batches(self) -> int:
        return self._of.num_batches

    def plan(self, epoch: int) -> list[list[Any]]:
        return [self._batch] * self.num_batches

    def size(self, item: Any) -> int:
        return self._of.size(item)


def _rehearse_steps(trainer: RoutedTrainer) -> _Clock:
    clock, worst = _Clock(), largest_batch(trainer)
    sampler, trainer.sampler = trainer.sampler, _Again(trainer.sampler, worst)
    args = trainer.args
    changed = {"max_steps": _STEPS, "save_strategy": "no", "eval_strategy": "no", "num_train_epochs": float(_STEPS)}
    before = {name: getattr(args, name) for name in changed}
    trainer.add_callback(clock)
    try:
        for name, value in changed.items():
            setattr(args, name, value)
        trainer.train()
    finally:
        trainer.sampler = sampler
        for name, value in before.items():
            setattr(args, name, value)
    return clock


def _check_reload(trainer: RoutedTrainer) -> None:
    """Overwrite experts and router, bring them back from the checkpoint, and see that they are as they were."""
    trained = {name: value for name, value in trainer.routed.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    folder = find_newest(trainer.keeper.folder, tell=trainer.tell)
    if folder is None:
        raise RunError("a checkpoint must be sound once it is written, got none that is. Check the disk.")
    with torch.no_grad():
        for value in trained.values():
            value.zero_()
    Checkpoint(folder).put_weights(trainer)
    wrong = [name for name, value in trained.items() if not torch.equal(value, before[name])]
    if wrong:
        raise RunError(f"a checkpoint must come back as it was written, got other values for {wrong[0]}.")


def _timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
