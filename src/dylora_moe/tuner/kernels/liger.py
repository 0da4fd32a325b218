"""The loss of a frozen head by Liger's kernels: softmax, loss and gradient of a chunk in one pass over its logits.

Their package is optional. Its formula is that of Hsu et al. 2024 (arXiv 2410.10989), section 3.2.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dylora_moe.tuner.kernels.machine import lacking, machine_of


def has_liger(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Liger's package is installed and its kernels can run there; it is not imported."""
    if find_spec("liger_kernel") is None:
        return False
    machine = machine_of(device)
    return not machine.is_interpreted and lacking(dtype, 0, machine) is None


def liger_loss(
    hidden: Float[Tensor, "rows features"],
    targets: Int[Tensor, " rows"],
    weight: Float[Tensor, "vocabulary features"],
    bias: Float[Tensor, " vocabulary"] | None,
    softcap: float | None,
    *,
    chunk_bytes: int,
    with_gradient: bool,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows features"] | None]:
    """Negative log-likelihood in nats of each row, float32, and its gradient with respect to the row's hidden state.

    A chunk's logits take `chunk_bytes`, up to twice as many where Liger rounds its rows up, or the states' own size
    where that is more.
    """
    liger = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    loss, _, _, _, gradient, _, _ = liger.fused_linear_cross_entropy_forward(
        hidden,
        weight,
        targets,
        bias=bias,
        reduction="none",
        softcap=softcap,
        compute_gradients=with_gradient,
        weight_requires_grad=False,
        chunk_mem_const=max(1, chunk_bytes // (hidden.numel() * hidden.element_size())),
    )
    return loss, gradient if with_gradient else None
