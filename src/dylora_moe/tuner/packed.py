"""One factor of all experts of a Linear, side by side in memory, trained as few large parameters.

N experts in every Linear are 2 * N * Linears small matrices. Autograd and the optimizer pay for each tensor, so
what they see is one parameter for each run of neighbouring experts that train: all of them in joint training, the
newest in a continual stream. PEFT's own weights are views of the same memory.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class PackedFactor(nn.Module):
    """A (N, rank, in) or B (N, out, rank) of the experts in the router's order; empty until laid out."""

    def __init__(self) -> None:
        super().__init__()
        self._starts: tuple[int, ...] = ()
        self._addresses: list[int] = []
        self._storage: Tensor | None = None

    @property
    def runs(self) -> tuple[nn.Parameter, ...]:
        """The parameters that train, each (experts of the run, ...), in the router's order."""
        return tuple(cast(nn.Parameter, self._parameters[f"run_{start}"]) for start in self._starts)

    @torch.no_grad()
    def lay_out(self, weights: Sequence[nn.Parameter], trainable: Sequence[bool]) -> None:
        """Copy the weights side by side, make them views of the copy, and make parameters of what trains.

        A run that stays where it was stays the same parameter, so an optimizer's moments for it stay valid.
        """
        self._storage = storage = torch.stack([weight.data for weight in weights])
        for index, weight in enumerate(weights):
            weight.data = storage[index]
            weight.requires_grad_(False)
        old = dict(zip(self._starts, self.runs, strict=True))
        bounds = runs_of(trainable)
        self._forget_runs()
        self._starts = tuple(start for start, _ in bounds)
        for start, stop in bounds:
            self.register_parameter(f"run_{start}", _run(old.get(start), storage[start:stop]))
        self._addresses = [part.data_ptr() for part in storage]

    def clear(self) -> None:
        """Back to separate weights."""
        self._forget_runs()
        self._addresses = []
        self._storage = None

    def _forget_runs(self) -> None:
        self._starts = ()
        self._parameters.clear()

    def _save_to_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing: a state dict holds the experts under PEFT's names, once."""

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing: loading PEFT's weights fills the memory they share."""

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """False when something (a cast, loaded weights) gave the weights other memory than the packed one."""
        runs = [self._addresses[start] for start in self._starts]
        return [w.data_ptr() for w in weights] == self._addresses and [w.data_ptr() for w in self.runs] == runs

    @torch.no_grad()
    def follow(self, weights: Sequence[nn.Parameter]) -> None:
        """Make the weights views of the memory that something gave to the one run that is all of them."""
        (run,) = self.runs
        self._storage = run.data
        for weight, part in zip(weights, run.data, strict=True):
            weight.data = part
        self._addresses = [part.data_ptr() for part in run.data]

    def run_of(self, index: int) -> tuple[nn.Parameter, int] | None:
        """The run in which an expert lies, and its place there; None where none takes gradients."""
        for start, run in zip(self._starts, self.runs, strict=True):
            if start <= index < start + run.shape[0] and run.requires_grad:
                return run, index - start
        return None

    def forward(self) -> Tensor:
        """The factor of all experts, such that gradients reach the runs."""
        assert self._storage is not None
        if len(self.runs) == 1 and self.runs[0].shape == self._storage.shape:
            return self.runs[0]
        return _Storage.apply(self._storage, self._starts, *self.runs)  # type: ignore[return-value]


class _Storage(torch.autograd.Function):
    """(storage (N, ...), first experts, *parameters, each a run of it) -> storage, with a gradient for each run."""

    @staticmethod
    def forward(ctx: Any, storage: Tensor, starts: Sequence[int], *params: Tensor) -> Tensor:
        ctx.runs = [(start, start + param.shape[0]) for start, param in zip(starts, params, strict=True)]
        return storage.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *(grad[start:stop] for start, stop in ctx.runs)


def runs_of(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Bounds (first, after the last) of each unbroken run of true flags."""
    bounds: list[tuple[int, int]] = []
    for index, flag in enumerate(flags):
        if not flag:
            continue
        if bounds and bounds[-1][1] == index:
            bounds[-1] = (bounds[-1][0], index + 1)
        else:
            bounds.append((index, index + 1))
    return bounds


def _run(old: nn.Parameter | None, values: Tensor) -> nn.Parameter:
    if old is None or old.shape != values.shape:
        return nn.Parameter(values)
    old.data = values
    old.requires_grad_(True)
    return old
