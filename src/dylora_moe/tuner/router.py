"""Routers and gates: features at the tap -> logits -> weights over the experts."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

_EPS = 1e-6

# A GEMM takes other paths for other widths, and its sums then differ in the last bit. At widths in steps of 32 a new
# expert left the logits of the others as they were in 160 of 160 draws, at its own width in 120 to 150.
_ROW_STEP = 32

_CLUSTER_ROUNDS = 20

_FIT_STEPS = 200


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

    @torch.no_grad()
    def seed_from(self, features: Float[Tensor, "units features"]) -> None:
        """Start each expert at a cluster of a calibrated sample, so that like inputs go to one expert from step one.

        A cluster's centre, at unit length, becomes the expert's row: logits are cosines times the features' length,
        about sqrt(features), scaled to a deviation of about 1. With fewer units than experts the drawn rows stay.
        """
        normalised = F.normalize(self.normalise(features), dim=-1)
        if normalised.shape[0] >= self.weight.shape[0]:
            self.weight.copy_(_cluster_centres(normalised, self.weight.shape[0]))

    def fit(self, features: Float[Tensor, "units features"], experts: Int[Tensor, " units"]) -> None:
        """Learn which units go to which expert: calibrate, then logistic regression, in float64 on the CPU.

        The sum of the cross-entropies plus half the squared norm of the weights is the least there is, as far as
        L-BFGS comes: enough that lines of equal lengths go to the same expert wherever they come from.
        """
        self.calibrate(features.to(self.mean))
        known, wanted = self.normalise(features.to(self.mean)).double().cpu(), experts.cpu()
        weight = torch.zeros(self.weight.shape, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=_FIT_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = F.cross_entropy(known @ weight.t(), wanted, reduction="sum") + weight.square().sum() / 2
            total.backward()
            return total

        optimizer.step(loss)  # type: ignore[arg-type]  # torch wants a float, and takes a tensor
        with torch.no_grad():
            self.weight.copy_(weight)

    def forward(self, features: Float[Tensor, "units features"]) -> Float[Tensor, "units experts"]:
        """Logits in float32, whatever the dtype of the base."""
        with torch.autocast(features.device.type, enabled=False):
            padded = F.pad(self.weight.float(), (0, 0, 0, -self.weight.shape[0] % _ROW_STEP))
            return F.linear(self.normalise(features), padded)[:, : self.weight.shape[0]]

    @torch.no_grad()
    def resize(self, keep: list[int], added: int) -> None:
        """Keep the given experts' rows, in that order, and append freshly drawn ones."""
        kept = self.weight[keep]
        fresh = kept.new_empty(added, self.weight.shape[1])
        nn.init.normal_(fresh, std=self.weight.shape[1] ** -0.5)
        self.weight = nn.Parameter(torch.cat([kept, fresh]), requires_grad=self.weight.requires_grad)


def _cluster_centres(points: Float[Tensor, "units features"], count: int) -> Float[Tensor, "count features"]:
    """Centres of spherical k-means, of unit length; each starts at the point farthest from those before it.

    Source: Dhillon and Modha, Concept Decompositions for Large Sparse Text Data, 2001.
    """
    centres = points.mean(0, keepdim=True)
    for _ in range(count):
        farthest = (points @ centres.t()).amax(1).argmin()
        centres = torch.cat([centres, points[farthest : farthest + 1]])
    centres = centres[1:]
    for _ in range(_CLUSTER_ROUNDS):
        member = F.one_hot((points @ centres.t()).argmax(1), count).to(points.dtype)
        sums = member.t() @ points
        centres = torch.where(member.sum(0)[:, None] > 0, F.normalize(sums, dim=-1), centres)
    return centres


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


def dense_gates(logits: Float[Tensor, "units experts"], temperature: float | Tensor) -> Float[Tensor, "units experts"]:
    """Dense collaboration: softmax(logits / temperature) over all experts."""
    return (logits / temperature).softmax(-1)
