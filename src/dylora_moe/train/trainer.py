"""transformers' Trainer plus the losses on routing, our evaluation, our order of rows and our checkpoints; no more."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from dylora_moe import ranks
from dylora_moe.data.batching import NO_DOMAIN, Collator, PlannedBatchSampler, TokenizedRow
from dylora_moe.data.packing import PackCollator, PackedBatchSampler, PackedDataset
from dylora_moe.errors import NotFinite, OnlyHere, RunError
from dylora_moe.evaluate.losses import Evaluation
from dylora_moe.evaluate.routing import RoutingReport
from dylora_moe.train.callbacks.clock import AtStart, StepClock
from dylora_moe.train.evaluator import Evaluator
from dylora_moe.train.figures import StepFigures
from dylora_moe.train.fit import Plan
from dylora_moe.train.keeper import Checkpoint, Keeper
from dylora_moe.train.memory import return_freed_memory
from dylora_moe.train.parameters import parameter_groups
from dylora_moe.train.parts import is_out_of_memory, num_rows, split_together
from dylora_moe.train.sharding import average_gradients, is_sharded
from dylora_moe.train.state import seed_rank
from dylora_moe.train.stopping import Stopped, StopSignals, ignore_signals
from dylora_moe.train.sums import put_sums
from dylora_moe.train.zero import DividedOptimizer
from dylora_moe.tuner import BatchLoad, DyLoraModel, LoadWindow
from dylora_moe.tuner.head import Head


class RoutedTrainer(Trainer):
    """Trains experts and router together.

    Args:
        model: The mixture; a single expert trains as a plain LoRA.
        args: transformers' settings.
        head: Of the base.
        train_rows: Rows to train on.
        sampler: Which of them each batch has.
        domains: Names; a row's `domain` is an index into them.
        evaluator: Measures the model.
        pad_token_id: What fills short rows.
        balance_coefficient: Weight of the balance loss, whose load is that of the whole optimizer step.
        z_coefficient: Weight of the z-loss.
        router_learning_rate: Of the router, where it is another than the experts'.
        schedule: (steps of the run, of its warm-up) -> factor of the learning rate at a step; None for the one that
            `args` names.
        patience: Evaluations in a row without a new best one after which to stop.
        load_best: End with the weights of the best evaluation.
        expert: The one that learns, once it is mature by itself; None for all of them under the router.
        divided: Divide gradients and moments among the processes (DeepSpeed).
        record_routing: Takes the step, `train` or `validation`, and how tokens were routed since last time.
        keeper: Writes the checkpoints.
        stop: Says when to end early.
        tell: Takes what a person should know.
        callbacks: Everything that is not the loop.
    """

    def __init__(
        self,
        model: DyLoraModel,
        args: TrainingArguments,
        *,
        head: Head,
        train_rows: Sequence[TokenizedRow],
        sampler: PlannedBatchSampler[Any],
        domains: Sequence[str],
        evaluator: Evaluator,
        pad_token_id: int,
        balance_coefficient: float,
        z_coefficient: float,
        router_learning_rate: float | None,
        schedule: Callable[[int, int], Callable[[int], float]] | None,
        patience: int | None,
        load_best: bool,
        expert: str | None,
        divided: bool,
        record_routing: Callable[[int, str, RoutingReport], None],
        keeper: Keeper,
        stop: StopSignals,
        tell: Callable[[str], None],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        packed = isinstance(sampler, PackedBatchSampler)
        self.sampler = sampler
        self.window = LoadWindow()
        self.clock = StepClock(self._begin_step, before_update=keeper.forget)
        super().__init__(
            model=model,
            args=args,
            train_dataset=PackedDataset(train_rows) if packed else train_rows,  # type: ignore[arg-type]
            eval_dataset=train_rows,  # type: ignore[arg-type]  # wanted, but `evaluate` has its own
            data_collator=(PackCollator if packed else Collator)(pad_token_id=pad_token_id),
            callbacks=[self.clock, AtStart(self._go_on), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # our own callbacks show progress
        # The loss is a sum over labelled tokens divided by their number in the whole optimizer step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.head, self.evaluator = head, evaluator
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.router_learning_rate, self.schedule = router_learning_rate, schedule
        self.patience, self.load_best, self.expert = patience, load_best, expert
        self._divide = divided
        self._divided: DividedOptimizer | None = None
        self.record_routing, self.keeper, self.stop, self.tell = record_routing, keeper, stop, tell
        self._checkpoint: Checkpoint | None = None
        self.figures = StepFigures(
            model.expert_names,
            domains,
            seconds=self.clock.take,
            record_routing=lambda report: self.record_routing(self.state.global_step, "train", report),
        )
        self.evaluation: Evaluation | None = None
        self.evaluated_at = -1
        self.best: Evaluation | None = None
        self.parts = 1  # in which a batch is computed: more when memory runs out
        self._passed: list[dict[str, Tensor]] = []
        self._load: BatchLoad | None = None

    @property
    def routed(self) -> DyLoraModel:
        """The mixture, whatever is wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    def use_plan(self, plan: Plan) -> None:
        """Compute batches in as many parts as fit into memory, and give back what is freed where that is short."""
        if plan.gives_back:
            return_freed_memory()
        self.parts = max(self.parts, ranks.most(plan.split))
        self.evaluator.rows = -(-self.evaluator.rows // ranks.most(plan.evaluation_split))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that seed and epoch decide."""
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=ignore_signals,
        )
        # Of each batch the sampler gives this process its share: nothing is left to divide.
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True, rng_types=[]
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group of parameters for the experts, and one or two for the router."""
        if self.optimizer is None:
            rate = self.router_learning_rate or self.args.learning_rate
            groups = parameter_groups(self.routed, router_learning_rate=rate)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options, weight_decay=self.args.weight_decay)
            if self._divide:
                self._divided = DividedOptimizer(self.routed, self.optimizer, max_grad_norm=self.args.max_grad_norm)
                self.optimizer, self.model_wrapped = self._divided, self._divided.engine
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the learning rate, of every group alike."""
        if self.schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        multiply = self.schedule(num_training_steps, self.args.get_warmup_steps(num_training_steps))
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, multiply)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _begin_step(self) -> None:
        self.window.clear()
        self._passed.clear()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, in parts where the whole of it did not fit into memory."""
        self.stop.check()
        self._passed.append(inputs)
        again: list[dict[str, Any]] = []
        parts = self.parts
        while True:
            try:
                for batch in again:
                    self._tr_loss += self._in_parts(model, batch, num_items_in_batch)
                loss = self._in_parts(model, inputs, num_items_in_batch)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(inputs, error)
            # Outside of the handler, whose error holds on to the memory of the step.
            self._take_back(model)
            again = self._passed[:-1]
        if self.parts > parts:
            self.tell(
                f"Memory ran out in step {self.state.global_step + 1}. From here on each batch is computed in "
                f"{self.parts} parts; what is learned stays the same."
            )
        return loss

    def _in_parts(self, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        parts = split_together(inputs, self.parts, lambda: self.data_collator([]))
        if len(parts) == 1:
            return self._pass(model, dict(inputs), num_items, last=True)
        self._load = self._load_of_parts(parts)
        total = torch.zeros((), device=self.args.device)
        try:
            for part in parts:
                self.stop.check()
                total = total + self._pass(model, part, num_items, last=part is parts[-1])
        finally:
            self._load = None
        return total

    def _pass(self, model: Any, part: dict[str, Any], num_items: Any, *, last: bool) -> Tensor:
        if self._divided is not None:
            self._divided.expect(last=last and self.accelerator.sync_gradients)
        return super().training_step(model, part, num_items)

    @torch.no_grad()
    def _load_of_parts(self, parts: Sequence[dict[str, Any]]) -> BatchLoad | None:
        """The load of the whole batch, for the balance loss of its parts: one more forward pass."""
        if not self.routed.routers or not (self.balance_coefficient or self.z_coefficient):
            return None
        load = BatchLoad(self.window, ranks.total)
        self.routed.train()
        for part in parts:
            batch = self._prepare_inputs(dict(part))
            domain = batch.pop("domain")
            with self.compute_loss_context_manager():
                self.routed(hidden_only=True, token_mask=domain != NO_DOMAIN, **batch)
            load.count(self.routed.decisions)
        return load.close()

    def _load_of_pass(self) -> BatchLoad:
        """The load of a batch that was computed at once, here and in the other processes."""
        load = BatchLoad(self.window, ranks.total)
        load.count(self.routed.decisions)
        return load.close()

    def _halve(self, inputs: Mapping[str, Tensor], error: Exception) -> None:
        if ranks.count() > 1:  # the others are in the middle of this step, and wait for its gradients
            raise OnlyHere(
                f"A step must fit into memory, and this process's share of a batch does not: {error} Lower batch_size "
                "and raise gradient_accumulation_steps as much, or set gradient_checkpointing."
            ) from error
        if self.parts >= num_rows(inputs):
            raise RunError(
                f"A step must fit into memory, and one row of {inputs['input_ids'].shape[1]} tokens does not: {error} "
                "Lower max_length, lora_r or num_experts, or set gradient_checkpointing or load_in_4bit."
            ) from error
        self.parts *= 2

    def _take_back(self, model: Any) -> None:
        """Be as before the first batch of this step."""
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        put_sums(self, self.keeper.moment.sums)
        self.window.clear()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Language loss per labelled token of the optimizer step, plus the weighted losses on routing.

        Of a batch that processes share, the mean over them.
        """
        domain = inputs.pop("domain")
        labels = inputs["labels"]
        with self._alone():
            nll = self.head.nll(model(hidden_only=True, token_mask=domain != NO_DOMAIN, **inputs), labels)
        count = nll.numel() if num_items_in_batch is None else num_items_in_batch
        language = nll.sum() / count
        routed, load = self.routed, self._load or self._load_of_pass()
        auxiliary = routed.auxiliary_losses(load)
        extra = self.balance_coefficient * auxiliary.balance + self.z_coefficient * auxiliary.z
        extra = extra * load.weigh(routed.decisions)
        self.figures.add(domain, inputs.get("position_ids"), routed.decisions, auxiliary, load.weigh(routed.decisions))
        return (language + extra / self.current_gradient_accumulation_steps) * ranks.count()

    def _alone(self) -> AbstractContextManager[None]:
        """Inside the block the expert that learns answers alone, but for its immature time among the others."""
        if self.expert is None or any(expert.maturity < 1 for expert in self.routed.experts):
            return nullcontext()
        return self.routed.forced(self.expert)

    def _clip_grad_norm(self, model: Any) -> Any:
        if is_sharded(model):
            average_gradients(model)
        norm: Any = super()._clip_grad_norm(model) if self._divided is None else self._divided.norm()
        # With a scaler, steps of such gradients are left out and tried with a smaller scale.
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise NotFinite(self.state.global_step + 1, float(norm), [batch["input_ids"] for batch in self._passed])
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add tokens, speed, memory and routing of the steps since the last line to what the Trainer logs."""
        if "train_runtime" in logs:  # of this process alone: another line where a run was stopped, none behind the end
            return
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise RunError(
                    f"{name} must be finite, got {logs[name]} at step {self.state.global_step}. Lower learning_rate, "
                    "or compute in float32 (--no-bf16)."
                )
        if "loss" in logs:
            logs |= self.figures.take()
        super().log(logs, *args, **kwargs)

    def measure(self) -> Evaluation:
        """The evaluation of the model as it is now, made only if the last one is older."""
        if self.evaluation is None or self.evaluated_at != self.state.global_step:
            self.evaluate()
        assert self.evaluation is not None
        return self.evaluation

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss of every domain and of their plain mean, and the routing of the validation rows."""
        self.evaluation = evaluation = self.evaluator.run(self.routed, self.stop.check)
        self.evaluated_at = self.state.global_step
        if evaluation.routing is not None:
            self.record_routing(self.state.global_step, "validation", evaluation.routing)
        metrics = {f"{metric_key_prefix}_loss": evaluation.mean_loss}
        metrics |= {f"{metric_key_prefix}_{result.domain}_loss": result.loss for result in evaluation.domains}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.best, self.control.should_save = self.evaluation, True
        elif self._is_over(self.state):
            self.control.should_training_stop = self.control.should_save = True
        return is_best

    def _is_over(self, state: TrainerState) -> bool:
        """True after the last step, and when no evaluation has been the best for too long."""
        evaluated = [line["step"] for line in state.log_history if "eval_loss" in line]
        waited = sum(step > (state.best_global_step or 0) for step in evaluated)
        return state.global_step >= state.max_steps or (self.patience is not None and waited >= self.patience)

    def train_from(self, folder: Path | None) -> None:
        """Train, or go on from a checkpoint that was found sound, as if there had been no stop.

        Raises:
            Stopped: A signal came; there is a checkpoint to go on from.
            RunError: A step or an evaluation cannot be made; there is a checkpoint of what was before it.
        """
        self._checkpoint = Checkpoint(folder) if folder else None
        with self.stop.deferred():
            try:
                self._train_from(folder)
                self.stop.check()
            except (Exception, Stopped) as error:
                if ranks.count() == 1 or ranks.reaches_all(error):
                    with suppress(RunError):  # that a checkpoint cannot be written may be the error itself
                        self.keeper.save(self)
                if self.stop.came is not None:
                    raise Stopped(self.stop.came) from error
                if is_out_of_memory(error):
                    raise RunError(
                        f"The optimizer must fit into memory, and does not: {error} Lower lora_r, num_experts or "
                        "batch_size, or set load_in_4bit."
                    ) from error
                raise
        self._take_best()
        ranks.share_random()  # for what comes after: each drew its own dropout

    def _train_from(self, folder: Path | None) -> None:
        if self._checkpoint is None:
            self.train()
            return
        state = self._checkpoint.trainer_state()
        if not self._is_over(state):
            self.train(resume_from_checkpoint=str(folder))
            return
        self.state = state
        self._checkpoint.put_weights(self)
        self._checkpoint.put_sums(self)
        if self._checkpoint.must_evaluate:
            self._determine_best_metric(self.evaluate(), None)

    def _take_best(self) -> None:
        step = self.state.best_global_step
        if not self.load_best or step is None or step == self.state.global_step:
            return
        found, fault = self.keeper.find_best(step)
        if found is None:
            self.tell(
                f"The best evaluation was at step {step}, but its checkpoint cannot be used: {fault}. The last step's "
                "weights are kept."
            )
            return
        Checkpoint(found).put_weights(self)
        self.evaluation, self.evaluated_at = self.best, self.state.global_step
        self.tell(f"Took the weights of step {step}, whose evaluation was the best.")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """In place of transformers' own, which writes pickles."""
        self.keeper.mark(self)
        self.keeper.save(self)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except (Stopped, RunError):  # in an evaluation, which the run is to begin with when it goes on
            self.keeper.mark(self, must_evaluate=True)
            raise
        self.keeper.mark(self)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # by an evaluation that was still to be made
            super()._run_epoch(*args, **kwargs)

    def _go_on(self) -> None:
        """Called once the Trainer has set its sums to nothing."""
        if self._checkpoint is None and not ranks.is_first():
            seed_rank(str(self.args.seed))
        if self._checkpoint is not None:
            self._checkpoint.put_random()
            self._checkpoint.put_sums(self)
            if self._checkpoint.must_evaluate:
                self.control.should_evaluate = True
                self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, self.state.epoch, None, 0.0)
        self.keeper.mark(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self._checkpoint is not None
        self._checkpoint.put_weights(self)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._checkpoint is not None:
            self._checkpoint.put_optimizer(self)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._checkpoint is not None:
            self._checkpoint.put_scaler(self)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._checkpoint is not None:
            self._checkpoint.put_random()
