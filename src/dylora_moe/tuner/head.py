"""The language model's loss without the logits: only labelled positions, in chunks, gradient made in the forward.

With V = 262,144 a full (batch, tokens, V) float32 tensor is a gigabyte at a thousand tokens. The head is frozen, so
the gradient of the loss with respect to a hidden state needs nothing from the backward pass but a factor.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dylora_moe.errors import TunerError
from dylora_moe.tuner import kernels

logger = logging.getLogger(__name__)

IGNORED = -100

# Elements of one chunk of logits: 64 MiB in float32. Larger chunks were no faster on CPU (docs/log.md).
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen output layer and what its model does to the logits after it."""

    weight: Float[Tensor, "vocabulary features"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    """Factor of the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""
    softcap: float | None = None
    """Gemma 2: logits become softcap * tanh(logits / softcap)."""

    def nll(
        self, hidden: Float[Tensor, "batch tokens features"], labels: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, " labelled"]:
        """Negative log-likelihood in nats of each labelled token, float32, in reading order.

        Position t predicts token t + 1; labels of -100 are left out before the head.
        """
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        # Mixed precision hands out float32 states of a 16-bit base.
        rows = hidden[:, :-1][wanted].to(self.weight.dtype)
        return _FrozenHeadLoss.apply(rows, targets[wanted], self)  # type: ignore[return-value]

    @torch.no_grad()
    def score(
        self, hidden: Float[Tensor, "batch tokens features"], labels: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, " labelled"], Bool[Tensor, " labelled"]]:
        """`nll`, and whether the likeliest token is the labelled one. Without gradients."""
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        rows, targets = hidden[:, :-1][wanted].to(self.weight.dtype), targets[wanted]
        losses, right = [], []
        for chunk, chosen in zip(*(each.split(self._rows_of_chunk) for each in (rows, targets)), strict=True):
            logits = self.logits(chunk)
            losses.append(_nll(logits, logits.logsumexp(-1, keepdim=True), chosen))
            right.append(logits.argmax(-1) == chosen)
        return torch.cat(losses), torch.cat(right)

    @property
    def _rows_of_chunk(self) -> int:
        return max(1, _CHUNK_ELEMENTS // self.weight.shape[0])

    def logits(self, hidden: Float[Tensor, "rows features"]) -> Float[Tensor, "rows vocabulary"]:
        """Logits in float32, as the model itself makes them."""
        logits = F.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class _FrozenHeadLoss(torch.autograd.Function):
    """(hidden (n, features), targets (n,), head) -> nll (n,), keeping d nll_i / d hidden_i for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        compute = by_liger if _takes_liger(hidden, head) else by_chunks
        losses, grads = compute(hidden, targets, head, with_gradient=ctx.needs_input_grad[0])
        if grads is not None:
            ctx.save_for_backward(grads)
        ctx.width = hidden.shape[-1]
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        if not saved:  # no labelled token; zeros, since DDP waits for a gradient of every parameter
            return grad.new_zeros(0, ctx.width), None, None
        (per_row,) = saved
        return (per_row * grad[:, None].to(per_row.dtype)), None, None


def by_chunks(hidden: Tensor, targets: Tensor, head: Head, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """nll (n,), and d nll_i / d hidden_i (n, features), with no more logits at a time than a chunk's."""
    losses, grads = [], []
    for chunk, wanted in zip(*(each.split(head._rows_of_chunk) for each in (hidden, targets)), strict=True):
        logits = head.logits(chunk)
        log_total = logits.logsumexp(-1, keepdim=True)
        losses.append(_nll(logits, log_total, wanted))
        if with_gradient:
            grads.append(_hidden_grad(head, logits, log_total, wanted).to(hidden.dtype))
    return (
        torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32),
        torch.cat(grads) if grads else None,
    )


def by_liger(hidden: Tensor, targets: Tensor, head: Head, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The same by the kernels of the package liger-kernel."""
    return kernels.liger_loss(
        hidden,
        targets,
        head.weight,
        head.bias,
        head.softcap,
        chunk_bytes=4 * _CHUNK_ELEMENTS,  # as many as ours, in float32
        with_gradient=with_gradient,
    )


def _takes_liger(hidden: Tensor, head: Head) -> bool:
    """On a GPU, where the package is installed and a trial went well. Other factors of the logits it does not know."""
    if not hidden.is_cuda or isinstance(hidden, FakeTensor) or head.scale != 1.0 or not len(hidden):
        return False
    return passes_trial(hidden.device, hidden.dtype, has_bias=head.bias is not None, is_capped=head.softcap is not None)


@cache
def passes_trial(device: torch.device, dtype: torch.dtype, *, has_bias: bool, is_capped: bool) -> bool:
    """Whether Liger's kernels give what chunks give there, tried once in a process; if not, the log says so."""
    if not kernels.has_liger(device, dtype):
        return False
    draw = torch.Generator().manual_seed(0)  # its own, so that a run's draws are the same with a trial and without
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw).to(device, dtype) for shape in ((48, 72), (520, 72), (520,))
    )
    targets = torch.randint(0, 520, (48,), generator=draw).to(device)
    head = Head(weight=weight * 0.2, bias=bias if has_bias else None, softcap=5.0 if is_capped else None)
    try:
        mine, theirs = (
            [each.float() for each in compute(hidden, targets, head, with_gradient=True) if each is not None]
            for compute in (by_liger, by_chunks)
        )
        passed, why = kernels.are_near(mine, theirs, dtype=dtype), "its numbers are not those of chunks"
    except Exception as error:  # of a compiler or driver, or of another version: chunks serve
        passed, why = False, f"{type(error).__name__}: {error}"
    if not passed:
        logger.warning("liger-kernel is left aside on %s in %s: %s", device, dtype, why)
    return passed


def _nll(logits: Tensor, log_total: Tensor, targets: Tensor) -> Tensor:
    return (log_total - logits.gather(1, targets[:, None])).squeeze(1)


def _hidden_grad(head: Head, logits: Tensor, log_total: Tensor, targets: Tensor) -> Tensor:
    """Gradient of each row's nll with respect to its hidden state; overwrites nothing but its own buffers."""
    slope = None
    if head.softcap is not None:
        slope = 1 - (logits / head.softcap).square_()
    grad = logits.sub_(log_total).exp_()  # softmax
    grad.scatter_add_(1, targets[:, None], grad.new_full((grad.shape[0], 1), -1.0))
    if slope is not None:
        grad *= slope
    if head.scale != 1.0:
        grad *= head.scale
    return grad.to(head.weight.dtype) @ head.weight


def read_head(lm: PreTrainedModel) -> Head:
    """The head of a causal language model, checked against the model's own logits on a few tokens.

    Raises:
        TunerError: the model does something to its logits that this loss does not know.
    """
    layer = lm.get_output_embeddings()
    if layer is None:
        raise TunerError(
            f"the base must be a causal language model with an output layer, {type(lm).__name__} has none."
        )
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if scaling := getattr(config, "logits_scaling", None):
        scale = 1.0 / scaling
    head = Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    _check_against(lm, head)
    return head


@torch.no_grad()
def _check_against(lm: PreTrainedModel, head: Head) -> None:
    ids = torch.arange(8, device=lm.device)[None] % head.weight.shape[0]
    was_training = lm.training
    lm.eval()
    hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    expected = lm(input_ids=ids, use_cache=False).logits.float()[0]
    lm.train(was_training)
    got = head.logits(hidden[0])
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()):
        raise TunerError(
            f"{type(lm).__name__} changes its logits after the head in a way this version does not know (off by "
            f"{(got - expected).abs().max().item():.3g}). Please report the architecture."
        )
