"""Gradients and moments of what trains, divided among processes by DeepSpeed (ZeRO stage 2): each updates its part."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dylora_moe import ranks
from dylora_moe.errors import RunError
from dylora_moe.tuner import DyLoraModel

# Values that are averaged at once; DeepSpeed's default would take 2 GB for them.
_BUCKET = 2**24


class DividedOptimizer(torch.optim.Optimizer):
    """Steps of an optimizer, in each process for its part of the weights; saved and loaded as that optimizer, whole.

    Args:
        model: Whose experts and routers train; the engine's from here on.
        optimizer: Over them; it keeps its groups, and gets one flat part in each.
        max_grad_norm: Of all gradients together.

    Attributes:
        engine: What to call in place of the model in passes that learn.
    """

    def __init__(self, model: DyLoraModel, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        import deepspeed  # pyright: ignore[reportMissingImports]  # an extra

        if not torch.cuda.is_available():
            # Else it would compile an exchange of its own for one machine, where gloo will do.
            deepspeed.ops.__compatible_ops__ = {}
        self._own = optimizer
        self._params: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self.engine, self._zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # for its own counts: rows are the sampler's
                "gradient_clipping": max_grad_norm,
                "zero_optimization": {"stage": 2, "reduce_bucket_size": _BUCKET},
                "zero_allow_untested_optimizer": True,
            },
        )
        model.follow_moved_weights()
        self._check_order()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the optimizer, each with its flat part."""
        return self._own.param_groups

    @property
    def state(self) -> Mapping[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the parts of this process."""
        return self._own.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the optimizer."""
        return self._own.defaults

    def expect(self, *, last: bool) -> None:
        """Say before a pass whether it is the last one of its step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def norm(self) -> Tensor:
        """Of all gradients of a step, after its last pass; infinite where one of them is no number."""
        return self._zero.scaled_global_norm()

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Clip the gradients, update this process's part, and get the others'."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a step forgets its gradients."""

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer alone gives it; all processes must call this, and the first one gets the states."""
        state: dict[int, dict[str, Tensor]] = {}
        groups: list[dict[str, Any]] = []
        for group, numbers, params in zip(self.param_groups, self._numbers(), self._params, strict=True):
            groups.append({**group, "params": numbers})
            for name, value in self.state.get(group["params"][0], {}).items():
                whole = _whole(value, params) if value.dim() else [value.clone() for _ in params]
                for number, each in zip(numbers, whole, strict=False):
                    state.setdefault(number, {})[name] = each
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set what `state_dict` gave, with any number of processes; each takes its part."""
        parts: dict[int, dict[str, Tensor]] = {}
        for place, (group, numbers) in enumerate(zip(self.param_groups, self._numbers(), strict=True)):
            known = [state_dict["state"][number] for number in numbers if number in state_dict["state"]]
            for name, value in known[0].items() if known else ():
                whole = [each[name] for each in known]
                parts.setdefault(place, {})[name] = _part(whole, group["params"][0]) if value.dim() else value
        groups = [{**group, "params": [place]} for place, group in enumerate(state_dict["param_groups"])]
        self._own.load_state_dict({"state": parts, "param_groups": groups})

    def _numbers(self) -> list[list[int]]:
        """Of the parameters of each group, as an optimizer counts them."""
        ends = list(accumulate(len(params) for params in self._params))
        return [list(range(end - len(params), end)) for end, params in zip(ends, self._params, strict=True)]

    def _check_order(self) -> None:
        """Parts must be of the parameters one behind the other, or checkpoints would mix them up."""
        for group, params in zip(self.param_groups, self._params, strict=True):
            for whole, own in zip(_whole(group["params"][0].detach(), params), params, strict=False):
                if not torch.equal(whole, own.detach().cpu()):
                    raise RunError(
                        "DeepSpeed must lay weights out in their order, and this version does not. Install one that "
                        "the tests ran with: pip install 'dylora-moe[deepspeed]'."
                    )


def _whole(part: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """A flat part of each process -> values for each parameter, on the CPU, in the first process; none elsewhere."""
    parts = ranks.to_first(part.cpu())
    if not parts:
        return []
    sizes = [param.numel() for param in params]
    flat = torch.cat(parts)[: sum(sizes)]  # what is behind fills the last part
    return [values.view_as(param) for values, param in zip(flat.split(sizes), params, strict=True)]


def _part(whole: Sequence[Tensor], like: Tensor) -> Tensor:
    """Values for each parameter -> the flat part of this process."""
    flat = torch.cat([values.flatten() for values in whole])
    padded = nn.functional.pad(flat, (0, like.numel() * ranks.count() - flat.numel()))
    return padded[ranks.rank() * like.numel() :][: like.numel()].clone()
