"""What a run will need: memory by part and at the worst moment, disk, time; known before its first step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dylora_moe.train.fit.trace import Meter, Pass, StepTrace, trace_evaluation, trace_step
from dylora_moe.train.fit.twin import Changes, Twin, make_twin
from dylora_moe.train.memory import resident_memory
from dylora_moe.tuner import DyLoraModel
from dylora_moe.tuner.inspect import decoder_layers

Moment = Literal["forward pass", "loss", "backward pass", "optimizer step", "evaluation"]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# Bytes of one weight of bitsandbytes' NF4: 4 bits, an 8-bit scale for each 64 and a float32 one for each 256 of those.
# Source: QLoRA, https://arxiv.org/abs/2305.14314, section 3.
_BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run does with its model.

    Attributes:
        train: The largest forward pass of training.
        evaluation: The largest of an evaluation; None without.
        accumulates: Whether several forward passes make one optimizer step.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        autocast: The dtype of mixed precision; None without.
    """

    train: Pass
    evaluation: Pass | None = None
    accumulates: bool = False
    gradient_checkpointing: bool = False
    autocast: torch.dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes, each part at its own largest. They do not add up to `peak`, as not all are held at the same moment.

    Attributes:
        process: Interpreter, libraries and data, as they are held already; none of it on a GPU.
        base: Weights of the base.
        experts: Weights of experts and routers.
        gradients: Of what trains.
        optimizer: State of the optimizer after its first step.
        activations: Kept by a forward pass for the backward pass.
        loss: Held while the loss is made, beyond the activations.
        evaluation: Held in a pass of evaluation, beyond the weights.
        allocator: Freed memory that the system's allocator keeps; `make_plan` adds it where it does.
        peak: All that is held at the worst moment.
        worst: That moment.
        checkpoint: One checkpoint on disk.
    """

    process: int
    base: int
    experts: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    evaluation: int
    peak: int
    worst: Moment
    checkpoint: int
    allocator: int = 0

    def parts(self) -> dict[str, int]:
        """Name -> bytes, in the order of a run."""
        names = (
            "process",
            "base",
            "experts",
            "optimizer",
            "gradients",
            "activations",
            "loss",
            "evaluation",
            "allocator",
        )
        return {name: getattr(self, name) for name in names}

    def disk(self, *, kept: int, data: int = 0) -> int:
        """Bytes of a run folder at its largest.

        Args:
            kept: Checkpoints to keep, besides the best one; one more is there while it is written.
            data: Of prepared data, where it is not there yet.
        """
        return (kept + 2) * self.checkpoint + self.experts + data


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Seconds that were measured of one optimizer step, one evaluation and one save."""

    step_s: float
    evaluation_s: float = 0.0
    save_s: float = 0.0

    def run_s(self, *, steps: int, evaluations: int = 0, saves: int = 0) -> float:
        """Seconds of a whole run."""
        return steps * self.step_s + evaluations * self.evaluation_s + saves * self.save_s


def fused_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that training uses."""
    return torch.optim.AdamW(parameters, fused=True)


class Estimator:
    """Estimates what workloads need with one model; what was traced once is remembered.

    Args:
        model: As it will train. It is only looked at.
        optimizer: Parameters -> optimizer.
        process: What the process holds besides the model, in bytes; None measures it now, which is right once the
            weights have been read (`read_head` reads them).
    """

    def __init__(
        self, model: DyLoraModel, *, optimizer: MakeOptimizer = fused_adamw, process: int | None = None
    ) -> None:
        self.model = model
        self.sizes = read_sizes(model)
        self._optimizer = optimizer_bytes(model, optimizer)
        if process is None:
            on_gpu = model.device.type == "cuda"
            process = 0 if on_gpu else max(0, resident_memory() - self.sizes.base - self.sizes.experts)
        self.process = process
        self._twins: dict[Changes, Twin] = {}
        self._steps: dict[Any, StepTrace] = {}
        self._evaluations: dict[Any, int] = {}

    def __call__(self, work: Workload, changes: Changes | None = None, *, four_bit: bool = False) -> Estimate:
        """Estimate a workload.

        Args:
            work: The workload.
            changes: What the model would have otherwise; sizes of experts are then in proportion.
            four_bit: Whether the base's Linears would be loaded in 4 bits.
        """
        changes = changes or Changes()
        sizes = _changed(self.model, self.sizes, changes, four_bit)
        share = sizes.trainable / max(self.sizes.trainable, 1)
        optimizer, of_step = (round(size * share) for size in self._optimizer)
        step = self._step(work, changes)
        gradients, before = sizes.trainable, sizes.trainable if work.accumulates else 0
        evaluation = self._evaluation(work, changes)
        moments: dict[Moment, int] = {
            "forward pass": before + step.forward,
            "loss": before + step.activations + step.loss,
            "backward pass": before + step.backward,
            "optimizer step": gradients + of_step,
            "evaluation": evaluation,
        }
        worst = max(moments, key=lambda moment: moments[moment])
        return Estimate(
            process=self.process,
            base=sizes.base,
            experts=sizes.experts,
            gradients=gradients,
            optimizer=optimizer,
            activations=step.activations,
            loss=step.loss,
            evaluation=evaluation,
            peak=self.process + sizes.base + sizes.experts + optimizer + moments[worst],
            worst=worst,
            checkpoint=sizes.trainable + optimizer,
        )

    def _twin(self, changes: Changes) -> Twin:
        if changes not in self._twins:
            self._twins[changes] = make_twin(self.model, changes)
        return self._twins[changes]

    def _step(self, work: Workload, changes: Changes) -> StepTrace:
        key = (replace(work, evaluation=None), changes)
        if key not in self._steps:
            self._steps[key] = trace_step(
                self._twin(changes),
                work.train,
                checkpointing=work.gradient_checkpointing,
                autocast=work.autocast,
                accumulates=work.accumulates,
            )
        return self._steps[key]

    def _evaluation(self, work: Workload, changes: Changes) -> int:
        if work.evaluation is None:
            return 0
        key = (work.evaluation, work.autocast, changes)
        if key not in self._evaluations:
            self._evaluations[key] = trace_evaluation(self._twin(changes), work.evaluation, autocast=work.autocast)
        return self._evaluations[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of a model's tensors: the base's, those of experts and routers, and the part of the latter that trains."""

    base: int
    experts: int
    trainable: int


def read_sizes(model: DyLoraModel) -> Sizes:
    """Exact, each piece of memory once."""
    own = [*model.routers.parameters(), *model.routers.buffers()]
    for _, linear in model.routed_linears():
        own += [*linear.lora_A.parameters(), *linear.lora_B.parameters()]
        own += [*linear.packed_A.parameters(), *linear.packed_B.parameters()]
    experts = _storages(own)
    everything = _storages([*model.parameters(), *model.buffers()])
    base = sum(size for key, size in everything.items() if key not in experts)
    trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return Sizes(base=base, experts=sum(experts.values()), trainable=trainable)


def optimizer_bytes(model: DyLoraModel, make: MakeOptimizer) -> tuple[int, int]:
    """Bytes of an optimizer's state, and what its step takes beyond state and gradients; found without taking any."""
    mode, device = FakeTensorMode(), model.device
    meter = Meter(device, 0)
    with mode:
        blanks = [
            nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        for blank in blanks:
            blank.grad = torch.empty_like(blank)
        meter.leave_out(blanks)
        meter.leave_out(blank.grad for blank in blanks if blank.grad is not None)
        with meter:
            optimizer = make(blanks)
            optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    size = sum(value.nbytes for value in states)
    return size, max(0, meter.peak - size)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of each piece of memory."""
    return {part.data_ptr(): part.nbytes() for part in (tensor.untyped_storage() for tensor in tensors)}


def _changed(model: DyLoraModel, sizes: Sizes, changes: Changes, four_bit: bool) -> Sizes:
    base = sizes.base
    if changes.dtype is not None:
        base = round(base * changes.dtype.itemsize / model.lm.dtype.itemsize)
    if four_bit:
        base -= sum(round(w.nbytes - w.numel() * _BYTES_4BIT) for w in _quantisable(model))
    share = _num_weights(model, changes) / max(_num_weights(model, Changes()), 1)
    return Sizes(base=base, experts=round(sizes.experts * share), trainable=round(sizes.trainable * share))


def _quantisable(model: DyLoraModel) -> list[Tensor]:
    adapted = [linear.base_layer for _, linear in model.routed_linears()]
    inner = {id(module) for _, linear in model.routed_linears() for module in linear.modules()}
    others = [module for module in decoder_layers(model.lm)[1].modules() if id(module) not in inner]
    return [module.weight for module in (*adapted, *others) if type(module) is nn.Linear]


def _num_weights(model: DyLoraModel, changes: Changes) -> float:
    """Weights of the experts, were they changed."""
    names, total = model.expert_names[: changes.num_experts], 0.0
    for _, linear in model.routed_linears():
        if linear.layer_index >= (changes.tap_layer or 0):
            for name in names:
                if name in linear.lora_A:
                    total += linear.num_parameters(name) * (changes.rank or linear.r[name]) / linear.r[name]
    return total
