"""A router made of statistics: features at the tap -> the nearest known skill -> its expert, or none is near enough.

Nothing here is learned by gradients, so a new skill adds a competitor and changes nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dylora_moe.errors import TunerError
from dylora_moe.tuner.router import LinearRouter

# How far below the least logit those of experts without a skill lie: their softmax is 0 in float32, and never NaN.
_BELOW = 1e4


class PrototypeRouter(nn.Module):
    """Sends each unit to the expert of the nearest skill, and says whether that skill is near enough.

    Features are scaled to unit root mean square and projected to the space in which the skills differ; its distances
    are in deviations within a skill. All tensors are buffers, and stay float32 whatever the base is cast to. New
    ones know no skill.
    """

    projection: Float[Tensor, "features dimensions"]
    centres: Float[Tensor, "skills dimensions"]
    """Of each skill, in that space."""
    radii: Float[Tensor, " skills"]
    """Distance up to which a unit is surely of the skill."""
    expert_of_skill: Int[Tensor, " skills"]

    def __init__(self, features: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer("projection", torch.zeros(features, 0))
        self.register_buffer("centres", torch.zeros(0, 0))
        self.register_buffer("radii", torch.zeros(0))
        self.register_buffer("expert_of_skill", torch.zeros(0, dtype=torch.long))

    def set_skills(self, *, projection: Tensor, centres: Tensor, radii: Tensor, expert_of_skill: Sequence[int]) -> None:
        """Take the place of all skills that are known.

        Args:
            projection: (features, dimensions).
            centres: (skills, dimensions).
            radii: (skills,), infinity for a skill that takes everything.
            expert_of_skill: The number of the expert that serves each skill.

        Raises:
            TunerError: shapes do not fit each other, a value is not finite, or there is no such expert.
        """
        device = self.projection.device
        found = {
            "projection": projection.to(device, torch.float32),
            "centres": centres.to(device, torch.float32),
            "radii": radii.to(device, torch.float32),
            "expert_of_skill": torch.as_tensor(expert_of_skill, dtype=torch.long, device=device),
        }
        _check(found, self.projection.shape[0], self.num_experts)
        for name, value in found.items():
            setattr(self, name, value.detach().clone().contiguous())

    def distances(self, features: Float[Tensor, "units features"]) -> Float[Tensor, "units skills"]:
        """To the centre of each skill, float32, whatever the dtype of the base."""
        with torch.autocast(features.device.type, enabled=False):
            rows = features.float()
            rows = rows / rows.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            # Not by products of matrices: their sums cancel where a unit is near.
            return torch.cdist(rows @ self.projection, self.centres, compute_mode="donot_use_mm_for_euclid_dist")

    def forward(self, features: Float[Tensor, "units features"]) -> Float[Tensor, "units experts"]:
        """Minus half the squared distance to the nearest skill of each expert: log likelihoods, but for a constant.

        Experts without a skill lie far below all others; where no skill is known all are 0.
        """
        return self._logits(self.distances(features))

    def sure(self, features: Float[Tensor, "units features"]) -> Bool[Tensor, " units"]:
        """Whether each unit lies within the radius of its nearest skill; none does where no skill is known."""
        return self._within(self.distances(features))

    def judge(
        self, features: Float[Tensor, "units features"]
    ) -> tuple[Float[Tensor, "units experts"], Bool[Tensor, " units"]]:
        """What `forward` and `sure` say, from one look."""
        distances = self.distances(features)
        return self._logits(distances), self._within(distances)

    def spread(self) -> Float[Tensor, ""]:
        """How far apart the skills of different experts lie, on the scale of the logits: by them the logit of an expert
        whose skill is as near as others usually are is lower by 1. 1 where there are no two such skills.

        The median over skills of half the squared distance to the nearest skill of another expert.
        """
        if len(self.centres) < 2:
            return self.centres.new_ones(())
        others = self.expert_of_skill[:, None] != self.expert_of_skill
        nearest = torch.cdist(self.centres, self.centres).masked_fill(~others, torch.inf).amin(1)
        usual = nearest.masked_fill(nearest.isinf(), torch.nan).nanmedian()
        return (usual**2 / 2).nan_to_num(nan=1.0).clamp_min(1.0)

    @torch.no_grad()
    def resize(self, keep: list[int], added: int) -> None:
        """Keep the given experts with their skills, in that order, and append some that have none."""
        place = {old: new for new, old in enumerate(keep)}
        numbers = self.expert_of_skill.tolist()
        kept = [skill for skill, expert in enumerate(numbers) if expert in place]
        self.centres, self.radii = self.centres[kept], self.radii[kept]
        experts = [place[numbers[skill]] for skill in kept]
        self.expert_of_skill = torch.tensor(experts, dtype=torch.long, device=self.radii.device)
        self.num_experts = len(keep) + added

    def _logits(self, distances: Float[Tensor, "units skills"]) -> Float[Tensor, "units experts"]:
        units, skills = distances.shape
        if not skills:
            return distances.new_zeros(units, self.num_experts)
        logits = distances.pow(2) * -0.5
        none = logits.amin(1, keepdim=True) - _BELOW
        of_skill = self.expert_of_skill.expand(units, skills)
        return none.repeat(1, self.num_experts).scatter_reduce(1, of_skill, logits, "amax")

    def _within(self, distances: Float[Tensor, "units skills"]) -> Bool[Tensor, " units"]:
        if not distances.shape[1]:
            return distances.new_zeros(distances.shape[0], dtype=torch.bool)
        distance, nearest = distances.min(1)
        return distance <= self.radii[nearest]

    def _apply(self, fn: Any, recurse: bool = True) -> "PrototypeRouter":
        # Follows a move, not a cast: distances are of the order of their rounding in 16 bits.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """The file knows how many skills there are."""
        found = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        if len(found) == len(self._buffers):
            try:
                _check(found, self.projection.shape[0], self.num_experts)
            except TunerError as error:
                error_msgs.append(str(error))
                return
            for name, value in found.items():
                setattr(self, name, torch.empty_like(value, device=self.projection.device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


Router: TypeAlias = LinearRouter | PrototypeRouter


def mixed_gates(
    logits: Float[Tensor, "units experts"], sure: Bool[Tensor, " units"], temperature: float | Tensor
) -> Float[Tensor, "units experts"]:
    """One expert where a unit is sure, dense collaboration where it is not."""
    alone = F.one_hot(logits.argmax(-1), logits.shape[1]).to(logits.dtype)
    return torch.where(sure[:, None], alone, (logits / temperature).softmax(-1))


def _check(found: Mapping[str, Tensor], features: int, num_experts: int) -> None:
    projection, centres, radii, experts = (
        found[name] for name in ("projection", "centres", "radii", "expert_of_skill")
    )
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    fits = projection.dim() == centres.dim() == 2 and projection.shape == (features, centres.shape[1])
    if not (fits and radii.shape == experts.shape == centres.shape[:1]):
        raise TunerError(
            f"prototypes must be a projection ({features}, dimensions), centres (skills, dimensions) and a radius and "
            f"an expert for each skill, got shapes {shapes}. Were they made at another tap or base?"
        )
    if not (projection.isfinite().all() and centres.isfinite().all() and (radii >= 0).all()):
        raise TunerError("prototypes must be finite numbers, and radii 0 or more; got others.")
    if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < num_experts:
        raise TunerError(
            f"each skill's expert must be one of the {num_experts} there are, got numbers {experts.tolist()}."
        )
