"""Few tokens without gradients, such as those of a step of generation: nothing but what the chosen experts compute.

The other executions do something for every expert, or copy the factors of those chosen; with a token or eight that
takes longer than the products. Here the host knows what was chosen, which on a CPU costs nothing.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dylora_moe.tuner.routing import Run

Part = tuple[Run, Tensor, Tensor, float]
"""What an expert computes, its A (r, i) and B (o, r), and its scale."""


def few(
    out: Float[Tensor, "*batch features_out"], x: Float[Tensor, "*batch features_in"], parts: Iterable[Part]
) -> Float[Tensor, "*batch features_out"]:
    """Adds the routed products to `out` in place, one expert after the other."""
    if x.dtype != torch.float32 or out.dtype != torch.float32:
        _add_runs(out, x, parts)
        return out
    # Each call into torch shows here: one token is a vector as it is, several are taken apart once.
    inputs, outputs = _vectors(x.contiguous()), _vectors(out)
    several: list[Part] = []
    for part in parts:
        run, a, b, scale = part
        if not run.each or a.dtype != torch.float32 or b.dtype != torch.float32:
            several.append(part)
        else:
            # Matrix times vector, added where it lies: two calls, in half the time of the general way.
            for token, weight in run.each:
                outputs[token].addmv_(b, torch.mv(a, inputs[token]), alpha=weight * scale)
    if several:
        _add_runs(out, x, several)
    return out


def _vectors(values: Float[Tensor, "*batch features"]) -> Sequence[Tensor]:
    """Of each token, as views."""
    features = values.shape[-1]
    return (values.view(-1),) if values.numel() == features else values.view(-1, features).unbind()


def _add_runs(
    out: Float[Tensor, "*batch features_out"], x: Float[Tensor, "*batch features_in"], parts: Iterable[Part]
) -> None:
    """The general way: any number of tokens, any dtypes."""
    rows, flat = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    for run, a, b, scale in parts:
        low = F.linear(rows.index_select(0, run.tokens), a.to(x.dtype))
        gated = (low * (run.weights * scale)).to(x.dtype)
        flat.index_add_(0, run.tokens, F.linear(gated, b.to(x.dtype)).to(flat.dtype))
