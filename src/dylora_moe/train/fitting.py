"""One fit: a session goes in, and its run folder has its checkpoints, figures and final model."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from transformers import TrainerCallback

from dylora_moe import ranks
from dylora_moe.config import RunConfig, to_yaml
from dylora_moe.data.inspect import view_data
from dylora_moe.errors import NotFinite, RunError
from dylora_moe.evaluate.generate import Answer, generate_answers
from dylora_moe.evaluate.losses import Evaluation
from dylora_moe.run_dir import (
    CHECKPOINTS,
    CONFIG,
    DATA,
    ENVIRONMENT,
    FINAL,
    REMOVED,
    RESULT,
    SAMPLES,
    START,
    TRACKERS,
    RunDir,
    environment,
)
from dylora_moe.train.callbacks.live import LiveView
from dylora_moe.train.callbacks.progress import ShowProgress
from dylora_moe.train.callbacks.trackers import Track
from dylora_moe.train.callbacks.watch import Watch
from dylora_moe.train.compiling import compile_layers
from dylora_moe.train.keeper import RUN, Checkpoint
from dylora_moe.train.live.figures import Place
from dylora_moe.train.needs import plan_memory
from dylora_moe.train.parameters import count_parameters
from dylora_moe.train.session import Session, Stages, build_trainer, calibrate_router
from dylora_moe.train.signs import Setup
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.trackers import Sample, Trackers
from dylora_moe.train.trainer import RoutedTrainer
from dylora_moe.tuner import save_model

# Characters by which a person knows a row again.
_SHOWN_OF_A_ROW = 60
# Seconds for trackers to end in when the run does not go on: a machine that is taken away gives about 30 in all.
_TRACKERS_GRACE_S = 5


def fit(
    session: Session,
    checkpoint: Path | None,
    trackers: Trackers,
    stages: Stages,
    stop: StopSignals,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    place: Place | None = None,
) -> dict[str, Any]:
    """Train, from a checkpoint where there is one, and return the result record, written last.

    Args:
        session: What to train.
        checkpoint: To go on from.
        trackers: Get the figures, too.
        stages: Show what happens.
        stop: Says when to end early.
        callbacks: More of them.
        place: Of this training in a stream of skills.

    Raises:
        Stopped: A signal came; from the last checkpoint it goes on.
    """
    run = session.run
    with closing(LiveView(stages.console, run, stop, place)) as live:
        watch = Watch(run, _watched(session), stages.tell)
        trainer = build_trainer(
            session,
            stop=stop,
            tell=stages.tell,
            callbacks=[
                ShowProgress(stages.console),
                Track(trackers, None if place else run / CHECKPOINTS),
                watch,
                live,
                *callbacks,
            ],
            extra=lambda: {"trackers": trackers.state()},
            saved=stages.saved,
        )
        if session.config.torch_compile:
            compile_layers(session.model, stages.tell)
        if session.config.sharding == "none" or ranks.count() == 1:  # of parts there is no estimate
            plan = plan_memory(session, trainer)
            stages.plan(plan)
            trainer.use_plan(plan)
        if checkpoint is None:
            _start_folder(session)
            trackers.start()
            start = _begin(session, trainer, stages)
            trackers.log_samples(0, _samples(session, start.answers))
        else:
            _go_on_tracking(trackers, run, checkpoint)
            start = _go_on(session, checkpoint, stages)
        watch.base_loss = start.before.mean_loss
        _fit(session, trainer, checkpoint)
        after = trainer.measure()
    answers = _answers(session)
    trackers.log_samples(trainer.state.global_step, _samples(session, answers))
    result = _result(session, trainer, start, after, answers)
    ranks.by_first(lambda: _write_model(session))
    trackers.log_best_model(run / FINAL)
    run.write(RESULT, result)
    return result


def _write_model(session: Session) -> None:
    folder = session.run / FINAL
    shutil.rmtree(folder, ignore_errors=True)  # of this run, if it was killed before it had its result
    save_model(
        session.model,
        folder,
        base_name=session.config.base_model,
        base_revision=session.base.resolved.revision,
        tokenizer=session.base.tokenizer,
    )


@contextmanager
def tracking(config: RunConfig, run: RunDir, stages: Stages) -> Iterator[Trackers]:
    """The run's trackers, ended however the block ends."""
    trackers = Trackers(
        config.report_to if ranks.is_first() else (),
        folder=run / TRACKERS,
        run_name=config.run_name,
        config=config.model_dump(mode="json"),
        environment=environment() if config.report_to else {},
        artifacts=config.wandb_artifacts,
        tell=stages.tell,
    )
    try:
        yield trackers
    except BaseException:
        trackers.finish(ok=False, seconds=_TRACKERS_GRACE_S)
        raise
    trackers.finish()


def _go_on_tracking(trackers: Trackers, run: RunDir, checkpoint: Path) -> None:
    """As the same runs, unless the checkpoint is another run's, which may go on beside this one."""
    made = Checkpoint(checkpoint)
    if checkpoint.parent == run / CHECKPOINTS:
        trackers.load(made.extra["trackers"])
    trackers.start(resumed_at=made.trainer_state().global_step)


def _watched(session: Session) -> Setup:
    config, domains = session.config, session.data.train.domains
    counts = np.bincount(domains, minlength=len(session.data.domains))
    return Setup(
        max_steps=0,  # known to the trainer
        warmup_ratio=config.warmup_ratio,
        learning_rate=config.learning_rate,
        rows_per_step=config.batch_size * config.gradient_accumulation_steps,
        top_k=config.top_k,
        domain_shares=tuple((counts / counts.sum()).tolist()),
    )


def _samples(session: Session, answers: list[Answer]) -> list[Sample]:
    named = zip(session.data.domains, answers, strict=False)
    return [Sample(domain=domain, prompt=answer.prompt, text=answer.text) for domain, answer in named]


def _fit(session: Session, trainer: RoutedTrainer, checkpoint: Path | None) -> None:
    try:
        trainer.train_from(checkpoint)
    except NotFinite as error:
        tokenizer = session.base.tokenizer
        own = [str(tokenizer.decode(row, skip_special_tokens=True)) for batch in error.batches for row in batch]
        rows = [row for of_rank in ranks.gather(own) for row in of_rank]
        shown = "; ".join(repr(" ".join(row.split())[:_SHOWN_OF_A_ROW]) for row in rows)
        raise RunError(
            f"{error} The step was not made, and the one before it is kept as a checkpoint. Lower learning_rate or "
            f"raise warmup_ratio under another --run_name, compute in float32 (--no-bf16), or look at the step's "
            f"{len(rows)} rows: {shown}."
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run knew before its first step, and what it must find again to go on.

    Attributes:
        base_revision: Of the base.
        data: Domain -> hash of its conversations.
        before: The base's evaluation.
        answers: The base's answers, one a domain.
    """

    base_revision: str | None
    data: dict[str, str]
    before: Evaluation
    answers: list[Answer]


def _begin(session: Session, trainer: RoutedTrainer, stages: Stages) -> Start:
    """Measure the base, which an interrupted run does once."""
    stages.console.print("Measuring the base before training ...")
    calibrate_router(session)
    answers = _answers(session)
    start = Start(**_inputs(session), before=trainer.measure(), answers=answers)
    session.run.write(START, asdict(start))
    return start


def _go_on(session: Session, checkpoint: Path, stages: Stages) -> Start:
    """Put the run folder back to where the checkpoint was made."""
    start = TypeAdapter(Start).validate_python(RunDir(checkpoint / RUN).read(START))
    for name, now in _inputs(session).items():
        if (then := getattr(start, name)) != now:
            what = {"base_revision": "base", "data": "data"}[name]
            raise RunError(
                f"The {what} must be what the run in {session.run.path} began with, got {now} instead of {then}. "
                "Bring it back, or choose another --run_name."
            )
    session.run.copy_from(checkpoint / RUN)
    session.run.write(CONFIG, to_yaml(session.config))
    _copy_removed(session)
    stages.console.print(f"Going on from {checkpoint.name}.", highlight=False)
    return start


def _inputs(session: Session) -> dict[str, Any]:
    """What a run was made from besides its settings."""
    data = {domain.domain: domain.sha256 for domain in session.data.summary.domains}
    return {"base_revision": session.base.resolved.revision, "data": data}


def _answers(session: Session) -> list[Answer]:
    """Greedy answers to the first validation prompt of each domain."""
    if not session.config.sample_tokens:
        return []
    return generate_answers(
        session.model,
        session.base.tokenizer,
        [examples[0].prompt for examples in session.data.validation_examples.values()],
        max_new_tokens=session.config.sample_tokens,
        end_token_ids=session.data.summary.end_token_ids,
    )


def _result(
    session: Session,
    trainer: RoutedTrainer,
    start: Start,
    after: Evaluation,
    answers: list[Answer],
) -> dict[str, Any]:
    """The record that ends a run; the answers also go to the samples file."""
    samples, trained = [], trainer.figures.trained()
    for domain, old, new in zip(session.data.domains, start.answers, answers, strict=False):
        samples.append({"domain": domain, "before": asdict(old), "after": asdict(new)})
        session.run.append(SAMPLES, {"step": 0, "domain": domain, **asdict(old)})
        session.run.append(SAMPLES, {"step": trainer.state.global_step, "domain": domain, **asdict(new)})
    return {
        "run": str(session.run.path),
        "base_model": session.config.base_model,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "tokens": sum(tokens for _, _, tokens in trained),
        "trained": [{"domain": domain, "rows": rows, "tokens": tokens} for domain, rows, tokens in trained],
        "parameters": [asdict(part) for part in count_parameters(session.model)],
        "before": asdict(start.before),
        "after": asdict(after),
        "samples": samples,
    }


def _start_folder(session: Session) -> None:
    session.run.write(CONFIG, to_yaml(session.config))
    session.run.clear()  # what a run left that was killed before its first checkpoint
    session.run.write(ENVIRONMENT, environment())
    session.run.write(DATA, view_data(session.data, session.base.tokenizer).as_record())
    _copy_removed(session)


def _copy_removed(session: Session) -> None:
    if session.run.writes and session.data.removed_file.stat().st_size:
        shutil.copyfile(session.data.removed_file, session.run / REMOVED)
