"""Which parameters train: counted by part, and refused when anything is not as it should be."""

import re
from dataclasses import dataclass

from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel

_ADAPTER = re.compile(r"\.lora_[AB]\.(?P<expert>[^.]+)\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCount:
    """Parameters of one part of the model: the base, the router, or one expert."""

    part: str
    trainable: int
    frozen: int


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in a `DyLoraModel`."""
    if match := _ADAPTER.search(name):
        return match["expert"]
    return "router" if name.startswith("routers.") else "base"


def count_parameters(model: DyLoraModel) -> list[PartCount]:
    """Trainable and frozen parameters of each part, base first."""
    counts: dict[str, list[int]] = {"base": [0, 0]}
    for name, parameter in model.named_parameters():
        count = counts.setdefault(part_of(name), [0, 0])
        count[0 if parameter.requires_grad else 1] += parameter.numel()
    return [PartCount(part=part, trainable=count[0], frozen=count[1]) for part, count in counts.items()]


def check_parameters(model: DyLoraModel) -> None:
    """Stop before the first step when what trains is not what should.

    Raises:
        TunerError: a weight of the base trains, one of an expert or of the router does not, or nothing does.
    """
    frozen = {expert.name for expert in model.experts if expert.frozen}
    wrong, any_trainable = [], False
    for name, parameter in model.named_parameters():
        part = part_of(name)
        should = part != "base" and part not in frozen
        any_trainable |= parameter.requires_grad
        if parameter.requires_grad != should:
            wrong.append(f"{name} ({'trains' if parameter.requires_grad else 'is frozen'})")
    if wrong:
        raise TunerError(
            f"only experts and router may train, and all of them must: {len(wrong)} parameters are otherwise, "
            f"such as {', '.join(wrong[:3])}."
        )
    if not any_trainable:
        raise TunerError("nothing trains: every expert is frozen. Unfreeze one, or add one.")
