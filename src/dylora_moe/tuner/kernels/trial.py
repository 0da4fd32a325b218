"""Two executions on the same small tensors: a kernel that a device computes wrongly must not train anything."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dylora_moe.tuner.routing import make_dispatch

_TOKENS, _EXPERTS, _RANK, _INPUTS, _OUTPUTS, _TOP_K = 48, 3, 16, 72, 40, 2
# Largest difference, as a share of the largest value: some roundings of each dtype.
_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def are_alike(
    one: Callable[..., Tensor], other: Callable[..., Tensor], *, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether two executions with the arguments of `grouped` give the same output and gradients, but for rounding."""
    return are_near(*(_outcome(each, device, dtype) for each in (one, other)), dtype=dtype)


def are_near(mine: Sequence[Tensor], theirs: Sequence[Tensor], *, dtype: torch.dtype) -> bool:
    """Whether each tensor is the other one but for roundings in a dtype."""
    pairs = zip(mine, theirs, strict=True)
    return all(bool((one - other).abs().max() <= _BOUNDS[dtype] * other.abs().max()) for one, other in pairs)


# Whoever asks may be in the middle of a pass of any kind.
@torch.inference_mode(False)
@torch.enable_grad()
def _outcome(compute: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of input, gates, A and B, in float32."""
    draw = torch.Generator().manual_seed(0)  # its own, since a run's draws are to be the same with a trial and without

    def random(*shape: int, **kind: Any) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, **kind)

    x = random(_TOKENS, _INPUTS, dtype=dtype).requires_grad_()
    a = random(_EXPERTS, _RANK, _INPUTS).requires_grad_()
    b = random(_EXPERTS, _OUTPUTS, _RANK).requires_grad_()
    gates = random(_TOKENS * _TOP_K).requires_grad_()
    experts = torch.rand(_TOKENS, _EXPERTS, generator=draw).topk(_TOP_K).indices.to(device)
    plan, scales = make_dispatch(experts, _EXPERTS), torch.full((_EXPERTS,), 0.5, device=device)
    out = compute(torch.zeros(_TOKENS, _OUTPUTS, device=device, dtype=dtype), x, gates, a, b, scales, plan, None)
    out.backward(random(_TOKENS, _OUTPUTS, dtype=dtype))
    return [
        tensor.detach().float() for tensor in (out, *(each.grad for each in (x, gates, a, b))) if tensor is not None
    ]
