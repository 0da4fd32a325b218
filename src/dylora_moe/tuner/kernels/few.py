"""Few tokens without gradients, such as those of a step of generation: nothing but what the chosen experts compute.

The other executions do something for every expert, or copy the factors of those chosen; with a token or eight that
takes longer than the products. Here the host knows what was chosen, which on a CPU costs nothing.
"""

from collections.abc import Iterable

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
    is_single = x.dtype == out.dtype == torch.float32
    # Each call into torch shows here: one token is a vector as it is, several are taken apart once.
    if x.numel() == x.shape[-1]:
        inputs, outputs = (x.view(-1),), (out.view(-1),)
    else:
        inputs, outputs = x.reshape(-1, x.shape[-1]).unbind(), out.view(-1, out.shape[-1]).unbind()
    for run, a, b, scale in parts:
        if is_single and run.is_short and a.dtype == b.dtype == torch.float32:
            # Matrix times vector, added where it lies: two calls, in half the time of the general way.
            for token, weight in run.pairs:
                outputs[token].addmv_(b, torch.mv(a, inputs[token]), alpha=weight * scale)
        else:
            _add_run(out, x, run, a, b, scale)
    return out


def _add_run(
    out: Float[Tensor, "*batch features_out"],
    x: Float[Tensor, "*batch features_in"],
    run: Run,
    a: Float[Tensor, "rank features_in"],
    b: Float[Tensor, "features_out rank"],
    scale: float,
) -> None:
    """The general way: any number of tokens, any dtypes."""
    rows, flat = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    low = F.linear(rows.index_select(0, run.tokens), a.to(x.dtype))
    gated = (low * (run.weights * scale)).to(x.dtype)
    flat.index_add_(0, run.tokens, F.linear(gated, b.to(x.dtype)).to(flat.dtype))
