"""Routers and gates: features at the tap -> logits -> weights over the experts; and the losses on routing."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_EPS = 1e-6

# Products of few rows take other paths through a GEMM for other numbers of experts, and then differ in the last bit:
# up to here logits are summed one by one, so that a new expert leaves those of the others as they were.
_FEW_UNITS = 64


class LinearRouter(nn.Module):
    """A learned linear map over normalised features.

    Features are scaled to unit root mean square, then standardised with the mean and deviation of a
    calibration sample: hidden states of one model differ by little more than a common direction (cosine above
    0.97 between the means of different domains), so a linear map on raw ones sends everything to one expert.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, features, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.reset()

    def reset(self) -> None:
        """Draw the weights anew: logits of standardised features then have a deviation of about 1."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def normalise(self, features: Float[Tensor, "units features"]) -> Float[Tensor, "units features"]:
        """Unit root mean square, then the calibrated mean and deviation; float32."""
        features = features.float()
        rms = features.pow(2).mean(-1, keepdim=True).add(_EPS).rsqrt()
        return (features * rms - self.mean.float()) / self.deviation.float()

    @torch.no_grad()
    def calibrate(self, features: Float[Tensor, "units features"]) -> None:
        """Set mean and deviation from a sample of at least two feature vectors of the frozen base."""
        features = features.float()
        unit = features * features.pow(2).mean(-1, keepdim=True).add(_EPS).rsqrt()
        self.mean.copy_(unit.mean(0))
        # One deviation for all features keeps the geometry (and does not blow up near-constant ones).
        self.deviation.copy_((unit - self.mean).pow(2).mean().sqrt().clamp_min(_EPS).expand_as(self.deviation))

    def forward(self, features: Float[Tensor, "units features"]) -> Float[Tensor, "units experts"]:
        """Logits in float32, whatever the dtype of the base."""
        with torch.autocast(features.device.type, enabled=False):
            normalised, weight = self.normalise(features), self.weight.float()
            if features.shape[0] <= _FEW_UNITS:
                return (normalised[:, None, :] * weight).sum(-1)
            return F.linear(normalised, weight)

    @torch.no_grad()
    def resize(self, keep: list[int], added: int) -> None:
        """Keep the given experts' rows, in that order, and append freshly drawn ones."""
        kept = self.weight[keep]
        fresh = kept.new_empty(added, self.weight.shape[1])
        nn.init.normal_(fresh, std=self.weight.shape[1] ** -0.5)
        self.weight = nn.Parameter(torch.cat([kept, fresh]), requires_grad=self.weight.requires_grad)


def sparse_gates(
    logits: Float[Tensor, "units experts"], probs: Float[Tensor, "units experts"], top_k: int
) -> tuple[Int[Tensor, "units top_k"], Float[Tensor, "units top_k"]]:
    """Sparse delegation: the top-k experts and their weights.

    k = 1: weight 1 in value with the gradient of the probability (straight-through), so that a delegated expert
    is exactly its LoRA; a softmax after the selection would give the router no gradient. k > 1: the chosen
    probabilities, renormalised: a softmax of the chosen logits, whose bits do not depend on how many others there are.
    """
    chosen, experts = probs.topk(top_k, dim=-1)
    if top_k == 1:
        return experts, chosen + (1 - chosen).detach()
    return experts, logits.gather(1, experts).softmax(-1)


def dense_gates(logits: Float[Tensor, "units experts"], temperature: float) -> Float[Tensor, "units experts"]:
    """Dense collaboration: softmax(logits / temperature) over all experts."""
    return (logits / temperature).softmax(-1)


def balance_loss(
    load_fraction: Float[Tensor, " experts"],
    probs: Float[Tensor, "units experts"],
    valid: Bool[Tensor, " units"],
) -> Float[Tensor, ""]:
    """N * sum over experts of f_e * P_e; 1 when balanced, N when collapsed.

    f, the share of the load, carries no gradient and may cover more micro-batches than `probs` does.
    Source: Switch Transformer, arXiv 2101.03961, eq. 4; f over the whole step: arXiv 2501.11873.
    """
    mean_probs = (probs * valid[:, None]).sum(0) / valid.sum().clamp_min(1)
    return probs.shape[1] * (load_fraction.detach() * mean_probs).sum()


def z_loss(logits: Float[Tensor, "units experts"], valid: Bool[Tensor, " units"]) -> Float[Tensor, ""]:
    """Mean squared log-sum-exp of the logits. Source: ST-MoE, arXiv 2202.08906, eq. 5."""
    squared = logits.logsumexp(-1).pow(2)
    return (squared * valid).sum() / valid.sum().clamp_min(1)
