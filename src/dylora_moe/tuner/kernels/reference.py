"""Slow and obvious; what the others are tested against."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def reference(
    x: Float[Tensor, "tokens features_in"],
    gates: Float[Tensor, "tokens experts"],
    lora_a: Float[Tensor, "experts rank features_in"],
    lora_b: Float[Tensor, "experts features_out rank"],
    scales: Float[Tensor, " experts"],
) -> Float[Tensor, "tokens features_out"]:
    """Every expert on every token, weighted; a zero gate contributes exactly zero."""
    out = torch.zeros(x.shape[0], lora_b.shape[1], dtype=x.dtype, device=x.device)
    for expert in range(lora_a.shape[0]):
        low_rank = F.linear(F.linear(x, lora_a[expert].to(x.dtype)), lora_b[expert].to(x.dtype))
        out = out + gates[:, expert, None].to(x.dtype) * scales[expert] * low_rank
    return out
