"""transformers' Trainer plus the losses on routing, our evaluation, and our order of rows; no more."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dylora_moe.data.batching import NO_DOMAIN, BucketedBatchSampler, Collator, TokenizedRow
from dylora_moe.data.packing import PackCollator, PackedBatchSampler, PackedDataset
from dylora_moe.errors import RunError
from dylora_moe.evaluate.losses import Evaluation, evaluate_domains
from dylora_moe.evaluate.routing import RoutingMeter, RoutingReport
from dylora_moe.tuner import AuxiliaryLosses, DyLoraModel, LoadWindow
from dylora_moe.tuner.head import Head


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
            callbacks=[self.clock, *callbacks],
        )
        self.remove_callback(PrinterCallback)  # our own callbacks show progress
        # The loss is a sum over labelled tokens divided by their number in the whole optimizer step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.head, self.validation, self.pad_token_id = head, validation, pad_token_id
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.record_routing = record_routing
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
