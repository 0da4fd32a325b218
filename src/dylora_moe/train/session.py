"""Settings -> what a run trains with: base, data, model and trainer, each shown and checked."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from dylora_moe import ranks
from dylora_moe.bases import LoadedBase, load_base
from dylora_moe.config import RunConfig
from dylora_moe.data.batching import Collator, pad_token_id
from dylora_moe.data.build import build_run_data
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.registry import registry_of
from dylora_moe.data.sampler import make_sampler
from dylora_moe.data.sources import check_path, parse_dataset_spec
from dylora_moe.data.templates import set_template
from dylora_moe.errors import ConfigError
from dylora_moe.evaluate.machine import base_dtype
from dylora_moe.evaluate.routing import RoutingReport
from dylora_moe.run_dir import CHECKPOINTS, ROUTING, RunDir
from dylora_moe.train.arguments import schedule_of, training_arguments
from dylora_moe.train.callbacks.record import RecordMetrics
from dylora_moe.train.evaluator import Evaluator
from dylora_moe.train.fit import Plan
from dylora_moe.train.keeper import Keeper
from dylora_moe.train.parameters import PartCount, check_parameters, count_parameters
from dylora_moe.train.sharding import shard_base
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.trainer import RoutedTrainer
from dylora_moe.tuner import DyLoraModel, ExpertConfig, RoutingConfig
from dylora_moe.tuner.head import Head, read_head

# Rows of each domain that calibrate the router's features.
_CALIBRATION_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Called with what each stage made, so that a shell can show it; each does nothing by default.

    `saved` is called when the run folder has something new to go on from.
    """

    data: Callable[[DataBundle], None] = lambda data: None
    parameters: Callable[[list[PartCount]], None] = lambda parts: None
    plan: Callable[[Plan], None] = lambda plan: None
    saved: Callable[[], None] = lambda: None
    console: Console = field(default_factory=lambda: Console(quiet=True))

    def tell(self, text: str) -> None:
        """Show a sentence."""
        self.console.print(text, highlight=False, markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a run trains with.

    Attributes:
        config: Its settings.
        run: Its folder.
        base: The base as loaded.
        data: What it learns, and is measured on.
        model: The mixture on the base.
        head: Of the base.
        expert: The one expert that learns, whatever the router says; None for all of them under the router.
    """

    config: RunConfig
    run: RunDir
    base: LoadedBase
    data: DataBundle
    model: DyLoraModel
    head: Head
    expert: str | None = None


def prepare(config: RunConfig, run: RunDir, stages: Stages) -> Session:
    """Base, data and model, each shown and checked; nothing is written yet."""
    ranks.by_first(lambda: _check_paths(config))  # a typo costs no download
    base = load_run_base(config, stages)
    data = ranks.in_turn(lambda: build_run_data(config, base.tokenizer, tell=stages.console.print))
    stages.data(data)
    _check_metric(config, data.domains)
    model = build_model(config, base)
    stages.parameters(count_parameters(model))
    check_parameters(model)
    head = read_head(model.lm)
    if config.sharding == "full" and ranks.count() > 1:
        shard_base(model)
    return Session(config=config, run=run, base=base, data=data, model=model, head=head)


def _check_paths(config: RunConfig) -> None:
    registry = registry_of(config.data_registry)
    for dataset in config.datasets:
        check_path(parse_dataset_spec(dataset, registry), registry)


def load_run_base(config: RunConfig, stages: Stages) -> LoadedBase:
    """The base of a run, its tokenizer with the template of the run."""
    dtype = base_dtype(bf16=config.bf16, fp16=config.fp16)
    base = load_base(config.base_model, dtype=dtype, load_in_4bit=config.load_in_4bit, progress=stages.console.print)
    set_template(base.tokenizer, config.chat_template)
    return base


def expert_config(config: RunConfig) -> ExpertConfig:
    """The shape of an expert of a run."""
    return ExpertConfig(
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
    )


def build_model(config: RunConfig, base: LoadedBase, experts: Sequence[str] | None = None) -> DyLoraModel:
    """The mixture on its base, experts untrained, in training mode.

    Args:
        config: Of the run.
        base: To build on; changed in place.
        experts: Their names; numbered ones when not given.
    """
    model = DyLoraModel(
        base.model,
        experts or [f"expert_{index}" for index in range(config.num_experts)],
        expert_config=expert_config(config),
        routing=RoutingConfig(
            granularity=config.granularity,
            router_scope=config.router_scope,
            tap_layer=config.tap_layer,
            top_k=config.top_k,
            temperature=config.temperature,
            execution=config.execution,
            router="prototype" if config.mode == "continual" and config.stream_router == "prototype" else "linear",
            unsure=config.unsure_answer,
        ),
    )
    return model.train()


def build_trainer(
    session: Session,
    *,
    stop: StopSignals,
    tell: Callable[[str], None],
    callbacks: Sequence[TrainerCallback] = (),
    extra: Callable[[], Mapping[str, Any]] = dict,
    saved: Callable[[], None] = lambda: None,
) -> RoutedTrainer:
    """transformers' Trainer with our losses, recording into the run folder.

    Args:
        session: Of the run.
        stop: Says when to end early.
        tell: Takes what a person should know.
        callbacks: More of them.
        extra: Gives what else checkpoints are to remember, as JSON has it.
        saved: Called after each checkpoint.
    """
    run, config, data = session.run, session.config, session.data
    sampler = make_sampler(config, data.train, data.domains, rank=ranks.rank(), num_ranks=ranks.count())
    padding = pad_token_id(session.base.tokenizer)

    def record_routing(step: int, split: str, report: RoutingReport) -> None:
        run.append(ROUTING, {"step": step, "split": split, **asdict(report)})

    return RoutedTrainer(
        session.model,
        training_arguments(
            config,
            steps_per_epoch=-(-len(sampler) // config.gradient_accumulation_steps),
            leaves_parameters_out=session.expert is not None,
        ),
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
        expert=session.expert,
        divided=config.sharding == "zero2" and ranks.count() > 1,
        keeper=Keeper(
            run / CHECKPOINTS,
            keep=config.save_total_limit,
            keep_best=config.load_best_model_at_end,
            copy_run=run.copy_to,
            extra=extra,
            saved=saved,
        ),
        stop=stop,
        tell=tell,
        callbacks=[RecordMetrics(run), *callbacks],
    )


def calibrate_router(session: Session) -> None:
    """Show the router a sample of training rows of every domain, so that it starts with centred features."""
    linear = session.model.routing_config.router == "linear"
    if not session.model.routers or not linear or session.expert is not None:  # one that is forced needs none
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


def _check_metric(config: RunConfig, domains: Sequence[str]) -> None:
    known = ["eval_loss", *(f"eval_{domain}_loss" for domain in domains)]
    if config.metric_for_best_model not in known:
        raise ConfigError(
            f"metric_for_best_model must be one of {', '.join(known)}, got {config.metric_for_best_model!r}."
        )


def check_machine(config: RunConfig) -> None:
    """Refuse what this machine cannot do.

    Raises:
        ConfigError: It cannot.
    """
    if config.fp16 and not torch.cuda.is_available():
        raise ConfigError("fp16 needs a GPU, and this machine has none. Use --bf16 or --no-bf16 (float32).")
    if config.activation_offload and not torch.cuda.is_available():
        raise ConfigError("activation_offload needs a GPU to take from, and this machine has none. Leave it out.")
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(
                f"Accelerate must not divide what trains, and its {name} plugin is on. Start without it; for a base "
                "that one device cannot hold, set sharding: full, for very many experts sharding: zero2."
            )
    if config.sharding == "zero2" and ranks.count() > 1 and find_spec("deepspeed") is None:
        raise ConfigError(
            "sharding: zero2 needs DeepSpeed. Install it: pip install 'dylora-moe[deepspeed]', or leave sharding out."
        )
    if config.batch_size % ranks.count():
        raise ConfigError(
            "batch_size must be a multiple of the number of processes, which share each batch, got "
            f"{config.batch_size} with {ranks.count()} processes. Change one of them; with gradient_accumulation_steps "
            "the effective batch can stay as it is."
        )
