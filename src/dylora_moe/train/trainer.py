"""transformers' Trainer plus the losses on routing, our evaluation, and our order of rows; no more."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from dylora_moe.data.batching import NO_DOMAIN, BucketedBatchSampler, Collator, TokenizedRow
from dylora_moe.data.packing import PackCollator, PackedBatchSampler, PackedDataset
from dylora_moe.errors import RunError
from dylora_moe.evaluate.losses import Evaluation, evaluate_domains
from dylora_moe.evaluate.routing import RoutingMeter, RoutingReport
from dylora_moe.train.checkpoint import prune, write_checkpoint
from dylora_moe.train.state import load_optimizer, load_random, load_weights, save_optimizer, save_random, save_weights
from dylora_moe.tuner import AuxiliaryLosses, DyLoraModel, LoadWindow
from dylora_moe.tuner.head import Head

STATE, _SUMS = "state.json", "sums.safetensors"


class RoutedTrainer(Trainer):
    """Trains experts and router together.

    Args:
        model: The mixture; a single expert trains as a plain LoRA.
        args: transformers' settings.
        head: Of the base.
        train_rows: Rows to train on.
        sampler: Which of them each batch has.
        validation: Domain -> rows; the domains' order gives meaning to a row's `domain`.
        pad_token_id: What fills short rows.
        balance_coefficient: Weight of the balance loss, whose load is that of the whole optimizer step.
        z_coefficient: Weight of the z-loss.
        record_routing: Takes the step, `train` or `validation`, and how tokens were routed since last time.
        checkpoints: Folder to write checkpoints into.
        journal: Gives what a checkpoint is to say of the run's files of lines.
        callbacks: Everything that is not the loop.
    """

    def __init__(
        self,
        model: DyLoraModel,
        args: TrainingArguments,
        *,
        head: Head,
        train_rows: Sequence[TokenizedRow],
        sampler: BucketedBatchSampler | PackedBatchSampler,
        validation: Mapping[str, Sequence[TokenizedRow]],
        pad_token_id: int,
        balance_coefficient: float,
        z_coefficient: float,
        record_routing: Callable[[int, str, RoutingReport], None],
        checkpoints: Path,
        journal: Callable[[], Mapping[str, int]],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        packed = isinstance(sampler, PackedBatchSampler)
        self.sampler = sampler
        self.window = LoadWindow()
        self.clock = _StepClock(self.window)
        super().__init__(
            model=model,
            args=args,
            train_dataset=PackedDataset(train_rows) if packed else train_rows,  # type: ignore[arg-type]
            eval_dataset=dict(validation),  # type: ignore[arg-type]
            data_collator=(PackCollator if packed else Collator)(pad_token_id=pad_token_id),
            callbacks=[self.clock, _AtStart(self._go_on), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # our own callbacks show progress
        # The loss is a sum over labelled tokens divided by their number in the whole optimizer step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.head, self.validation, self.pad_token_id = head, validation, pad_token_id
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.record_routing, self.checkpoints, self.journal = record_routing, checkpoints, journal
        self._checkpoint: Path | None = None
        self.meter = RoutingMeter(model.expert_names, tuple(validation))
        # Of each domain.
        self.rows_seen, self.tokens_seen = (torch.zeros(len(validation), dtype=torch.long) for _ in range(2))
        self._tokens_logged = 0
        self.auxiliary: AuxiliaryLosses | None = None
        self.evaluation: Evaluation | None = None
        self.evaluated_at = -1

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that seed and epoch decide."""
        loader = DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)  # type: ignore[arg-type]
        return self.accelerator.prepare(loader)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Language loss per labelled token of the optimizer step, plus the weighted losses on routing."""
        domain = inputs.pop("domain")
        labels = inputs["labels"]
        nll = self.head.nll(model(hidden_only=True, token_mask=domain != NO_DOMAIN, **inputs), labels)
        count = nll.numel() if num_items_in_batch is None else num_items_in_batch
        language = nll.sum() / count
        routed: DyLoraModel = self.accelerator.unwrap_model(model)
        auxiliary = routed.auxiliary_losses(self.window)
        extra = self.balance_coefficient * auxiliary.balance + self.z_coefficient * auxiliary.z
        self.meter.add(list(routed.decisions.values()), domain)
        self._count(domain, inputs.get("position_ids"))
        self.auxiliary = AuxiliaryLosses(balance=auxiliary.balance.detach(), z=auxiliary.z.detach())
        return language + extra / self.current_gradient_accumulation_steps

    def _count(self, domain: Tensor, position_ids: Tensor | None) -> None:
        """Add a batch to what each domain gave; both arguments (batch, tokens), int64."""
        member = F.one_hot(domain - NO_DOMAIN, 1 + len(self.rows_seen))[..., 1:]
        first = member[:, 0] if position_ids is None else member * (position_ids == 0)[..., None]
        self.rows_seen = self.rows_seen.to(domain.device) + first.reshape(-1, len(self.rows_seen)).sum(0)
        self.tokens_seen = self.tokens_seen.to(domain.device) + member.sum((0, 1))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add tokens, speed and routing of the steps since the last line to what the Trainer logs."""
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise RunError(
                    f"{name} must be finite, got {logs[name]} at step {self.state.global_step}. Lower learning_rate, "
                    "or compute in float32 (--no-bf16)."
                )
        if "loss" in logs:
            logs |= self._figures()
        super().log(logs, *args, **kwargs)

    def _figures(self) -> dict[str, float]:
        tokens = int(self.tokens_seen.sum())
        figures: dict[str, float] = {
            "tokens": tokens,
            "tokens_per_second": (tokens - self._tokens_logged) / max(self.clock.take(), 1e-9),
        }
        self._tokens_logged = tokens
        if self.auxiliary is not None:
            figures |= {"balance_loss": float(self.auxiliary.balance), "z_loss": float(self.auxiliary.z)}
        report = self.meter.report()
        if report is not None:
            figures |= {"router_entropy": report.decision_entropy, "load_entropy": report.load_entropy}
            figures |= {"dead_experts": len(report.dead), "max_violation": report.max_violation}
            figures |= {f"load_{name}": share for name, share in zip(report.experts, report.load, strict=True)}
            self.record_routing(self.state.global_step, "train", report)
            self.meter.clear()
        return figures

    def measure(self) -> Evaluation:
        """The evaluation of the model as it is now, made only if the last one is older."""
        if self.evaluation is None or self.evaluated_at != self.state.global_step:
            self.evaluate()
        assert self.evaluation is not None
        return self.evaluation

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss of every domain and of their plain mean, and the routing of the validation rows."""
        self.evaluation = evaluation = evaluate_domains(
            self.accelerator.unwrap_model(self.model),
            self.head,
            self.validation,
            batch_size=self.args.per_device_eval_batch_size,
            pad_token_id=self.pad_token_id,
        )
        self.evaluated_at = self.state.global_step
        if evaluation.routing is not None:
            self.record_routing(self.state.global_step, "validation", evaluation.routing)
        metrics = {f"{metric_key_prefix}_loss": evaluation.mean_loss}
        metrics |= {f"{metric_key_prefix}_{result.domain}_loss": result.loss for result in evaluation.domains}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, or go on from a checkpoint that was found sound, as if there had been no stop."""
        self._checkpoint = checkpoint
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
        else:
            load_weights(self.accelerator.unwrap_model(self.model), checkpoint)
            self.state = state
            self._set_loop(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """In place of transformers' own, which writes pickles."""
        write_checkpoint(self.checkpoints, self.state.global_step, self._fill)
        prune(self.checkpoints, keep=self.args.save_total_limit or 1)

    def _fill(self, folder: Path) -> None:
        save_weights(self.accelerator.unwrap_model(self.model), folder)
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        scaler = self.accelerator.scaler
        record = {
            "optimizer": save_optimizer(optimizer, folder),
            "schedule": schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": save_random(folder),
            "journal": dict(self.journal()),
            "loop": self._save_loop(folder),
        }
        (folder / STATE).write_text(json.dumps(record), encoding="utf-8")
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save_loop(self, folder: Path) -> dict[str, Any]:
        """What was summed up since the last line of metrics and since the start."""
        sums = {"loss": self._tr_loss, "rows_seen": self.rows_seen, "tokens_seen": self.tokens_seen}
        routed = {f"routing.{name}": value for name, value in self.meter.sums().items()}
        save_file({name: value.cpu() for name, value in (sums | routed).items()}, folder / _SUMS)
        return {
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "tokens_logged": self._tokens_logged,
            "evaluated_at": self.evaluated_at,
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
        }

    def _set_loop(self, checkpoint: Path) -> None:
        loop, device = read_state(checkpoint)["loop"], self.args.device
        sums = {name: value.to(device) for name, value in load_file(checkpoint / _SUMS).items()}
        self._tr_loss, self.rows_seen, self.tokens_seen = (sums[name] for name in ("loss", "rows_seen", "tokens_seen"))
        prefix = "routing."
        self.meter.set_sums({n.removeprefix(prefix): value for n, value in sums.items() if n.startswith(prefix)})
        self._total_loss_scalar, self._globalstep_last_logged = loop["total_loss"], loop["last_logged"]
        self._tokens_logged, self._initial_global_step = loop["tokens_logged"], 0
        self.evaluated_at = loop["evaluated_at"]
        self.evaluation = TypeAdapter(Evaluation | None).validate_python(loop["evaluation"])

    def _go_on(self) -> None:
        """Called once the Trainer has set its sums to nothing."""
        if self._checkpoint is not None:
            self._set_loop(self._checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            record = read_state(Path(checkpoint))
            optimizer: Any = self.optimizer
            schedule: Any = self.lr_scheduler
            load_optimizer(optimizer, Path(checkpoint), record["optimizer"])
            schedule.load_state_dict(record["schedule"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(read_state(Path(checkpoint))["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(Path(checkpoint), read_state(Path(checkpoint))["random"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint has besides tensors and transformers' own record."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


class _AtStart(TrainerCallback):
    """Calls a function when the Trainer is about to take its first step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._act()


class _StepClock(TrainerCallback):
    """Seconds spent in training steps, evaluations left out; and an empty load window for each step."""

    def __init__(self, window: LoadWindow) -> None:
        self._window = window
        self._spent, self._began = 0.0, 0.0

    def take(self) -> float:
        """Seconds since the last call."""
        spent, self._spent = self._spent, 0.0
        return spent

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._window.clear()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._spent += time.perf_counter() - self._began
