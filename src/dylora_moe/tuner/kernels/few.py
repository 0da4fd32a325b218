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
    out: Float[Tensor, "*batch features_out"], x: Float[Tensor, "tokens features_in"], parts: Iterable[Part]
) -> Float[Tensor, "*batch features_out"]:
    """Adds the routed products to `out` in place, one expert after the other."""
    flat = out.view(-1, out.shape[-1])
    for run, a, b, scale in parts:
        if run.weight is not None and a.dtype == b.dtype == x.dtype == flat.dtype == torch.float32:
            # Matrix times vector, added where it lies: two calls, in half the time of the general way.
            flat[run.token].addmv_(b, torch.mv(a, x[run.token]), alpha=run.weight * scale)
        else:
            low = F.linear(x.index_select(0, run.tokens), a.to(x.dtype))
            gated = (low * (run.weights * scale)).to(x.dtype)
            flat.index_add_(0, run.tokens, F.linear(gated, b.to(x.dtype)).to(flat.dtype))
    return out
