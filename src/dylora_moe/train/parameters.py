"""Which parameters train: counted by part, and refused when anything is not as it should be."""

import re
from dataclasses import dataclass
from typing import Any

from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel

# PEFT's adapter weights, and the packed memory that they are views of.
_EXPERT = re.compile(r"\.(lora_[AB]\.[^.]+\.weight|packed_[AB]\.run_\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCount:
    """Parameters of one part of the model: the base, the router, or one expert."""

    part: str
    trainable: int
    frozen: int


def count_parameters(model: DyLoraModel) -> list[PartCount]:
    """Trainable and frozen parameters of each part, base first; memory that experts share packed counts once."""
    counts = {"base": [0, 0]}
    if model.routers:
        counts["router"] = [0, 0]
    for name, parameter in model.named_parameters():
        if not _EXPERT.search(name):
            part = "router" if name.startswith("routers.") else "base"
            counts[part][0 if parameter.requires_grad else 1] += parameter.numel()
    for expert in model.expert_names:
        counts[expert] = [0, 0]
        for _, linear in model.routed_linears():
            if expert in linear.lora_A:
                counts[expert][0 if linear.trains(expert) else 1] += linear.num_parameters(expert)
    return [PartCount(part=part, trainable=count[0], frozen=count[1]) for part, count in counts.items()]


def check_parameters(model: DyLoraModel) -> None:
    """Stop before the first step when what trains is not what should.

    Raises:
        TunerError: a weight of the base trains, one of an expert or of the router does not, or nothing does.
    """
    frozen = {expert.name for expert in model.experts if expert.frozen}
    wrong = []
    for part in count_parameters(model):
        should_train = part.part != "base" and part.part not in frozen
        if should_train and part.frozen:
            wrong.append(f"{part.frozen:,} of {part.part} are frozen and must train")
        if not should_train and part.trainable:
            wrong.append(f"{part.trainable:,} of {part.part} train and must be frozen")
    if wrong:
        raise TunerError(
            f"only experts and router may train, and all of them must; got parameters: {'; '.join(wrong)}."
        )
    if frozen == set(model.expert_names):
        raise TunerError("nothing trains: every expert is frozen. Unfreeze one, or add one.")


def parameter_groups(model: DyLoraModel, *, router_learning_rate: float) -> list[dict[str, Any]]:
    """What trains, as an optimizer takes it: the experts, the router's weights, and its biases, which do not decay."""
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    experts = [value for name, value in trained if not name.startswith("routers.")]
    router = [value for name, value in trained if name.startswith("routers.")]
    groups = [
        {"params": experts},
        {"params": [value for value in router if value.dim() > 1], "lr": router_learning_rate},
        {"params": [value for value in router if value.dim() <= 1], "lr": router_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
