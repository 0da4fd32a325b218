"""THE PAGE: settings -> base, data, model, trainer -> a fitted mixture in its run folder."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from transformers import set_seed

from dylora_moe.bases import LoadedBase, load_base
from dylora_moe.config import RunConfig, to_yaml
from dylora_moe.data.batching import Collator, pad_token_id
from dylora_moe.data.build import build_run_data
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.inspect import view_data
from dylora_moe.data.paths import with_full_paths
from dylora_moe.data.registry import registry_of
from dylora_moe.data.sampler import make_sampler
from dylora_moe.data.sources import check_path, parse_dataset_spec
from dylora_moe.data.templates import set_template
from dylora_moe.errors import ConfigError, RunError
from dylora_moe.evaluate.generate import Answer, generate_answers
from dylora_moe.evaluate.losses import Evaluation
from dylora_moe.evaluate.machine import base_dtype
from dylora_moe.evaluate.routing import RoutingReport
from dylora_moe.run_dir import (
    CHECKPOINTS,
    CONFIG,
    DATA,
    ENVIRONMENT,
    FINAL,
    REMOVED,
    RESULT,
    ROUTING,
    SAMPLES,
    START,
    RunDir,
    environment,
)
from dylora_moe.train.arguments import schedule_of, training_arguments
from dylora_moe.train.callbacks.progress import ShowProgress
from dylora_moe.train.callbacks.record import RecordMetrics
from dylora_moe.train.evaluator import Evaluator
from dylora_moe.train.folder import find_start, finished_result, settle_here
from dylora_moe.train.keeper import RUN, Keeper
from dylora_moe.train.parameters import PartCount, check_parameters, count_parameters
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.trainer import NotFinite, RoutedTrainer
from dylora_moe.tuner import DyLoraModel, ExpertConfig, RoutingConfig, save_model
from dylora_moe.tuner.head import Head, read_head

# Rows of each domain that calibrate the router's features.
_CALIBRATION_ROWS = 32
# Characters by which a person knows a row again.
_SHOWN_OF_A_ROW = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Called with what each stage made, so that a shell can show it; each does nothing by default."""

    data: Callable[[DataBundle], None] = lambda data: None
    parameters: Callable[[list[PartCount]], None] = lambda parts: None
    console: Console = field(default_factory=lambda: Console(quiet=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a run trains with."""

    config: RunConfig
    run: RunDir
    base: LoadedBase
    data: DataBundle
    model: DyLoraModel
    head: Head


def train(config: RunConfig, stages: Stages | None = None, stop: StopSignals | None = None) -> dict[str, Any]:
    """Train as configured, in the run's own folder, and return its result record.

    A folder whose run is finished with the same settings is left alone and its result returned; one whose run did not
    finish is gone on with.

    Raises:
        DyLoraError: any bad setting, data, base or folder, before the first step.
        Stopped: A signal came; the same call goes on.
    """
    stages, stop = stages or Stages(), stop or StopSignals()
    config = settle_here(with_full_paths(config))
    run = RunDir(config.run_dir)
    with run.locked():
        if run.is_finished:
            return finished_result(run, config)
        _check_machine(config)
        checkpoint = find_start(run, config, _teller(stages))
        set_seed(config.seed)
        session = prepare(config, run, stages)
        with closing(ShowProgress(stages.console)) as progress:
            trainer = build_trainer(session, progress, stop=stop, tell=_teller(stages))
            start = _begin(session, trainer, stages) if checkpoint is None else _go_on(session, checkpoint, stages)
            _fit(session, trainer, checkpoint)
            after = trainer.measure()
        result = _result(session, trainer, start, after, _answers(session))
        shutil.rmtree(run / FINAL, ignore_errors=True)  # of this run, if it was killed before it had its result
        save_model(
            session.model,
            run / FINAL,
            base_name=config.base_model,
            base_revision=session.base.resolved.revision,
            tokenizer=session.base.tokenizer,
        )
        run.write(RESULT, result)
    return result


def _teller(stages: Stages) -> Callable[[str], None]:
    return lambda text: stages.console.print(text, highlight=False, markup=False)


def _fit(session: Session, trainer: RoutedTrainer, checkpoint: Path | None) -> None:
    try:
        trainer.train_from(checkpoint)
    except NotFinite as error:
        tokenizer = session.base.tokenizer
        rows = [str(tokenizer.decode(row, skip_special_tokens=True)) for batch in error.batches for row in batch]
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
    _start_folder(session)
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


def prepare(config: RunConfig, run: RunDir, stages: Stages) -> Session:
    """Base, data and model, each shown and checked; nothing is written yet."""
    registry = registry_of(config.data_registry)
    for dataset in config.datasets:  # a typo costs no download
        check_path(parse_dataset_spec(dataset, registry), registry)
    dtype = base_dtype(bf16=config.bf16, fp16=config.fp16)
    base = load_base(config.base_model, dtype=dtype, load_in_4bit=config.load_in_4bit, progress=stages.console.print)
    set_template(base.tokenizer, config.chat_template)
    data = build_run_data(config, base.tokenizer, tell=stages.console.print)
    stages.data(data)
    _check_metric(config, data.domains)
    model = build_model(config, base)
    stages.parameters(count_parameters(model))
    check_parameters(model)
    return Session(config=config, run=run, base=base, data=data, model=model, head=read_head(model.lm))


def build_model(config: RunConfig, base: LoadedBase) -> DyLoraModel:
    """The mixture on its base, experts untrained, in training mode."""
    targets = config.target_modules
    model = DyLoraModel(
        base.model,
        [f"expert_{index}" for index in range(config.num_experts)],
        expert_config=ExpertConfig(
            rank=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            target_modules=targets,
        ),
        routing=RoutingConfig(
            granularity=config.granularity,
            router_scope=config.router_scope,
            tap_layer=config.tap_layer,
            top_k=config.top_k,
            temperature=config.temperature,
            execution=config.execution,
        ),
    )
    return model.train()


def build_trainer(
    session: Session, progress: ShowProgress, *, stop: StopSignals, tell: Callable[[str], None]
) -> RoutedTrainer:
    """transformers' Trainer with our losses, recording into the run folder."""
    run, config, data = session.run, session.config, session.data
    sampler, padding = make_sampler(config, data.train, data.domains), pad_token_id(session.base.tokenizer)

    def record_routing(step: int, split: str, report: RoutingReport) -> None:
        run.append(ROUTING, {"step": step, "split": split, **asdict(report)})

    return RoutedTrainer(
        session.model,
        training_arguments(config, steps_per_epoch=-(-len(sampler) // config.gradient_accumulation_steps)),
        head=session.head,
        train_rows=data.train,
        sampler=sampler,
        domains=data.domains,
        evaluator=Evaluator(
            session.head, data.validation, rows=config.eval_batch_size, pad_token_id=padding, tell=tell
        ),
        pad_token_id=padding,
        balance_coefficient=config.balance_coefficient,
        z_coefficient=config.z_coefficient,
        router_learning_rate=config.router_learning_rate,
        schedule=schedule_of(config),
        patience=config.early_stopping_patience,
        load_best=config.load_best_model_at_end,
        record_routing=record_routing,
        keeper=Keeper(
            run / CHECKPOINTS,
            keep=config.save_total_limit,
            keep_best=config.load_best_model_at_end,
            copy_run=run.copy_to,
        ),
        stop=stop,
        tell=tell,
        callbacks=[RecordMetrics(run), progress],
    )


def calibrate_router(session: Session) -> None:
    """Show the router a sample of training rows of every domain, so that it starts with centred features."""
    if not session.model.routers:
        return
    data, size = session.data, session.config.eval_batch_size
    rows = []
    for index in range(len(data.domains)):
        rows += [data.train[int(place)] for place in data.train.of_domain(index)[:_CALIBRATION_ROWS]]
    collate = Collator(pad_token_id=pad_token_id(session.base.tokenizer))
    batches = []
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size])
        batches.append({key: value.to(session.model.device) for key, value in batch.items() if key != "domain"})
    session.model.calibrate(batches)


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
    samples = []
    for domain, old, new in zip(session.data.domains, start.answers, answers, strict=False):
        samples.append({"domain": domain, "before": asdict(old), "after": asdict(new)})
        session.run.append(SAMPLES, {"step": 0, "domain": domain, **asdict(old)})
        session.run.append(SAMPLES, {"step": trainer.state.global_step, "domain": domain, **asdict(new)})
    return {
        "run": str(session.run.path),
        "base_model": session.config.base_model,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "tokens": int(trainer.figures.tokens.sum()),
        "trained": [
            {"domain": domain, "rows": int(rows), "tokens": int(tokens)}
            for domain, rows, tokens in zip(
                session.data.domains, trainer.figures.rows, trainer.figures.tokens, strict=True
            )
        ],
        "parameters": [asdict(part) for part in count_parameters(session.model)],
        "before": asdict(start.before),
        "after": asdict(after),
        "samples": samples,
    }


def _start_folder(session: Session) -> None:
    session.run.clear()  # what a run left that was killed before its first checkpoint
    session.run.write(CONFIG, to_yaml(session.config))
    session.run.write(ENVIRONMENT, environment())
    session.run.write(DATA, view_data(session.data, session.base.tokenizer).as_record())
    _copy_removed(session)


def _copy_removed(session: Session) -> None:
    if session.data.removed_file.stat().st_size:
        shutil.copyfile(session.data.removed_file, session.run / REMOVED)


def _check_metric(config: RunConfig, domains: Sequence[str]) -> None:
    known = ["eval_loss", *(f"eval_{domain}_loss" for domain in domains)]
    if config.metric_for_best_model not in known:
        raise ConfigError(
            f"metric_for_best_model must be one of {', '.join(known)}, got {config.metric_for_best_model!r}."
        )


def _check_machine(config: RunConfig) -> None:
    if config.fp16 and not torch.cuda.is_available():
        raise ConfigError("fp16 needs a GPU, and this machine has none. Use --bf16 or --no-bf16 (float32).")
