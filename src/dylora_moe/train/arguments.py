"""Settings of a run -> those of transformers' Trainer."""

from collections.abc import Callable

import torch
from transformers import TrainingArguments

from dylora_moe.config import RunConfig
from dylora_moe.train.schedules import two_phase


def schedule_of(config: RunConfig) -> Callable[[int, int], Callable[[int], float]] | None:
    """(steps of the run, of its warm-up) -> factor of the learning rate at a step; None where transformers has it."""
    if config.lr_scheduler_type != "two_phase":
        return None
    return lambda steps, warmup: two_phase(
        num_steps=steps,
        warmup_steps=warmup,
        seeding_ratio=config.seeding_ratio,
        factor=config.consolidation_factor,
    )


def training_arguments(
    config: RunConfig, *, steps_per_epoch: int, leaves_parameters_out: bool = False
) -> TrainingArguments:
    """What transformers' Trainer is to know.

    Args:
        config: Of the run.
        steps_per_epoch: Optimizer steps.
        leaves_parameters_out: Whether a pass may have no use for some of what trains, as of the router while one
            expert answers alone.
    """
    eval_steps = steps_per_epoch if config.eval_steps == "epoch" else config.eval_steps
    save_steps = steps_per_epoch if config.save_steps == "epoch" else config.save_steps
    has_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
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
        lr_scheduler_type="constant" if config.lr_scheduler_type == "two_phase" else config.lr_scheduler_type,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        fp16=config.fp16,
        use_cpu=not has_gpu,  # Apple's device lacks float64 and grouped_mm
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"offload": True} if config.activation_offload else None,
        logging_steps=config.logging_steps,
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        metric_for_best_model=config.metric_for_best_model if eval_steps else None,
        greater_is_better=False,
        save_strategy="steps",
        save_steps=save_steps,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=config.dataloader_num_workers,
        dataloader_pin_memory=has_gpu if config.dataloader_pin_memory is None else config.dataloader_pin_memory,
        logging_nan_inf_filter=False,
        # Of several processes (DistributedDataParallel): buffers change between passes nowhere.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=leaves_parameters_out,
        # DeepSpeed divides the gradients of each pass, so that none may be kept back.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": config.sharding == "zero2"}},
    )
    # One GPU for one process: the threads of nn.DataParallel would share the routing of one model.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
