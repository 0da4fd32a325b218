"""THE PAGE: settings -> base, data, model, trainer -> a fitted mixture in its run folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import TrainingArguments, set_seed

from dylora_moe.bases import LoadedBase, load_base
from dylora_moe.config import RunConfig, make_config, to_yaml
from dylora_moe.data.batching import Collator
from dylora_moe.data.build import DataBundle, build_data
from dylora_moe.errors import ConfigError, RunError
from dylora_moe.evaluate.generate import Answer, generate_answers
from dylora_moe.evaluate.losses import Evaluation
from dylora_moe.evaluate.machine import base_dtype
from dylora_moe.evaluate.routing import RoutingReport
from dylora_moe.run_dir import CONFIG, DATA, ENVIRONMENT, FINAL, METRICS, RESULT, ROUTING, SAMPLES, RunDir, environment
from dylora_moe.train.callbacks.progress import ShowProgress
from dylora_moe.train.callbacks.record import RecordMetrics
from dylora_moe.train.parameters import PartCount, check_parameters, count_parameters
from dylora_moe.train.trainer import RoutedTrainer
from dylora_moe.tuner import DyLoraModel, ExpertConfig, RoutingConfig, save_model
from dylora_moe.tuner.head import Head, read_head

# Rows of each domain that calibrate the router's features.
_CALIBRATION_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Called with what each stage made, so that a shell can show it; each does nothing by default."""

    data: Callable[[DataBundle], None] = lambda data: None
    parameters: Callable[[list[PartCount]], None] = lambda parts: None
    console: Console = field(default_factory=lambda: Console(quiet=True))


def train(config: RunConfig, stages: Stages | None = None) -> dict[str, Any]:
    """Train as configured, in the run's own folder, and return its result record.

    A folder whose run is finished with the same settings is left alone and its result returned.

    Raises:
        DyLoraError: any bad setting, data, base or folder, before the first step.
    """
    stages = stages or Stages()
    run = RunDir(config.run_dir)
    with run.locked():
        if run.is_finished:
            return _finished(run, config)
        _start_folder(run, config)
        set_seed(config.seed)
        dtype = base_dtype(bf16=config.bf16, fp16=config.fp16)
        _check_machine(config)

        base = load_base(
            config.base_model, dtype=dtype, load_in_4bit=config.load_in_4bit, progress=stages.console.print
        )
        data = build_run_data(config, base)
        run.write(DATA, asdict(data.summary))
        stages.data(data)
        model = build_model(config, base)
        parts = count_parameters(model)
        stages.parameters(parts)
        check_parameters(model)
        head = read_head(model.lm)
        trainer = build_trainer(config, run, base, data, model, head, stages)

        fitted = _fit(config, run, base, data, model, head, trainer, stages)
        save_model(model, run / FINAL, base_name=config.base_model, tokenizer=base.tokenizer)
        result = _result(config, parts, trainer, *fitted)
        run.write(RESULT, result)
    return result


def build_run_data(config: RunConfig, base: LoadedBase) -> DataBundle:
    """The rows that a run trains and validates on."""
    return build_data(
        config.datasets,
        base.tokenizer,
        max_length=config.max_length,
        overlong=config.overlong,
        validation_split=config.validation_split,
        training_subset=config.training_subset,
        eval_subset=config.eval_subset,
        seed=config.seed,
    )


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
    config: RunConfig,
    run: RunDir,
    base: LoadedBase,
    data: DataBundle,
    model: DyLoraModel,
    head: Head,
    stages: Stages,
) -> RoutedTrainer:
    """transformers' Trainer with our losses, recording into the run folder."""

    def record_routing(step: int, split: str, report: RoutingReport) -> None:
        run.append(ROUTING, {"step": step, "split": split, **asdict(report)})

    return RoutedTrainer(
        model,
        _training_arguments(config),
        head=head,
        train_rows=data.train,
        validation=data.validation,
        pad_token_id=_pad_id(base),
        balance_coefficient=config.balance_coefficient,
        z_coefficient=config.z_coefficient,
        record_routing=record_routing,
        callbacks=[RecordMetrics(run), ShowProgress(stages.console)],
    )


def _training_arguments(config: RunConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(config.run_dir),
        run_name=config.run_name,
        seed=config.seed,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps or -1,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.lr_scheduler_type,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        fp16=config.fp16,
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=config.logging_steps,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,
    )


def _fit(
    config: RunConfig,
    run: RunDir,
    base: LoadedBase,
    data: DataBundle,
    model: DyLoraModel,
    head: Head,
    trainer: RoutedTrainer,
    stages: Stages,
) -> tuple[Evaluation, Evaluation, list[tuple[str, Answer, Answer]]]:
    """Evaluate and sample, train, evaluate and sample again."""
    stages.console.print("Measuring the base before training ...")
    calibrate_router(config, data, model, _pad_id(base))
    before_samples = _samples(config, base, data, model)
    trainer.evaluate()
    before = trainer.evaluation
    trainer.train()
    if trainer.evaluated_at != trainer.state.global_step:
        trainer.evaluate()
    after = trainer.evaluation
    assert before is not None and after is not None
    after_samples = _samples(config, base, data, model)
    samples = list(zip(data.domains, before_samples, after_samples, strict=False))
    for domain, old, new in samples:
        run.append(SAMPLES, {"step": 0, "domain": domain, **asdict(old)})
        run.append(SAMPLES, {"step": trainer.state.global_step, "domain": domain, **asdict(new)})
    return before, after, samples


def calibrate_router(config: RunConfig, data: DataBundle, model: DyLoraModel, pad_token_id: int) -> None:
    """Show the router a sample of training rows of every domain, so that it starts with centred features."""
    if not model.routers:
        return
    rows = []
    for index in range(len(data.domains)):
        rows += [row for row in data.train if row.domain == index][:_CALIBRATION_ROWS]
    collate = Collator(pad_token_id=pad_token_id)
    batches = []
    for start in range(0, len(rows), config.eval_batch_size):
        batch = collate(rows[start : start + config.eval_batch_size])
        batches.append({key: value.to(model.device) for key, value in batch.items() if key != "domain"})
    model.calibrate(batches)


def _samples(config: RunConfig, base: LoadedBase, data: DataBundle, model: DyLoraModel) -> list[Answer]:
    if not config.sample_tokens:
        return []
    prompts = [examples[0].prompt for examples in data.validation_examples.values()]
    return generate_answers(
        model,
        base.tokenizer,
        prompts,
        max_new_tokens=config.sample_tokens,
        end_token_ids=data.end_token_ids,
    )


def _result(
    config: RunConfig,
    parts: list[PartCount],
    trainer: RoutedTrainer,
    before: Evaluation,
    after: Evaluation,
    samples: list[tuple[str, Answer, Answer]],
) -> dict[str, Any]:
    return {
        "run": str(config.run_dir),
        "base_model": config.base_model,
        "steps": trainer.state.global_step,
        "tokens": int(trainer.tokens_seen),
        "parameters": [asdict(part) for part in parts],
        "before": asdict(before),
        "after": asdict(after),
        "samples": [{"domain": d, "before": asdict(old), "after": asdict(new)} for d, old, new in samples],
    }


def _start_folder(run: RunDir, config: RunConfig) -> None:
    if (run / METRICS).exists() or (run / FINAL).exists():
        raise RunError(
            f"{run.path} holds a run that did not finish. Move or delete it, or choose another --run_name; "
            "nothing was changed."
        )
    run.write(CONFIG, to_yaml(config))
    run.write(ENVIRONMENT, environment())


def _finished(run: RunDir, config: RunConfig) -> dict[str, Any]:
    stored = make_config(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")), where=str(run / CONFIG))
    changed = [name for name in RunConfig.model_fields if getattr(stored, name) != getattr(config, name)]
    if changed:
        differences = ", ".join(f"{n} {getattr(stored, n)!r} there, {getattr(config, n)!r} here" for n in changed)
        raise RunError(
            f"{run.path} holds a finished run with other settings: {differences}. Choose another --run_name."
        )
    return {**run.read(RESULT), "already_finished": True}


def _check_machine(config: RunConfig) -> None:
    if config.fp16 and not torch.cuda.is_available():
        raise ConfigError("fp16 needs a GPU, and this machine has none. Use --bf16 or --no-bf16 (float32).")


def _pad_id(base: LoadedBase) -> int:
    return int(base.tokenizer.pad_token_id)
