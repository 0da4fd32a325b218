"""Logits -> a decision: which experts each unit goes to, with which weights, and its tokens sorted by expert."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dylora_moe.tuner.config import RoutingConfig
from dylora_moe.tuner.prototype import mixed_gates
from dylora_moe.tuner.router import dense_gates, sparse_gates
from dylora_moe.tuner.routing import BASE, Decision, make_dispatch, runs_of_few

# Slots of a pass without gradients up to which one product for each expert that has any is the cheapest on a CPU.
FEW_SLOTS = 32


def make_decision(
    logits: Float[Tensor, "units experts"],
    valid: Bool[Tensor, " units"],
    row_of_unit: Int[Tensor, " units"],
    unit_of_token: Int[Tensor, " tokens"] | None,
    config: RoutingConfig,
    *,
    dense: bool,
    temperature: float | Tensor | None = None,
    sure: Bool[Tensor, " units"] | None = None,
    speakers: Int[Tensor, " batch"] | None = None,
) -> Decision:
    """Logits -> weights over experts, and for sparse delegation the tokens sorted by expert.

    Args:
        logits: Float32.
        valid: False for padding.
        row_of_unit: Row of the batch that each unit belongs to.
        unit_of_token: Unit that decides for each token; None when every token is its own unit.
        config: Says how many experts contribute, and what answers for units that are not sure.
        dense: All experts contribute to every unit.
        temperature: Of weights over all experts, on the scale of the logits; that of the config where not given.
        sure: Whether each unit is near enough to a skill; None where the router does not say.
        speakers: Of each row of the batch an expert's number, ROUTED or BASE; None where all are routed.
    """
    softness = config.temperature if temperature is None else temperature
    probs = logits.softmax(-1)
    experts = dispatch = slot_weights = few = None
    if dense:
        weights = dense_gates(logits, softness)
    elif sure is not None and config.unsure == "dense" and _any(valid & ~sure):
        weights = mixed_gates(logits, sure, softness)
    else:
        experts, weights = sparse_gates(logits, probs, config.top_k)
        if sure is not None and config.unsure == "base":
            weights = weights * sure[:, None]
    if speakers is not None:
        experts, weights = _overridden(experts, weights, speakers.index_select(0, row_of_unit), logits.shape[1])
    if experts is not None:
        of_token, token_weights = experts, weights
        if unit_of_token is not None:
            of_token, token_weights = experts.index_select(0, unit_of_token), weights.index_select(0, unit_of_token)
        dispatch = make_dispatch(of_token, logits.shape[1])
        slot_weights = token_weights.reshape(-1).index_select(0, dispatch.slot_order)
        if _is_few(slot_weights):
            few = runs_of_few(dispatch, slot_weights)
    return Decision(
        logits=logits,
        probs=probs,
        experts=experts,
        weights=weights,
        valid=valid,
        unit_of_token=unit_of_token,
        row_of_unit=row_of_unit,
        dispatch=dispatch,
        slot_weights=slot_weights,
        few=few,
        sure=sure,
    )


def _overridden(
    experts: Int[Tensor, "units top_k"] | None,
    weights: Float[Tensor, "units chosen"],
    speaker: Int[Tensor, " units"],
    num_experts: int,
) -> tuple[Int[Tensor, "units top_k"] | None, Float[Tensor, "units chosen"]]:
    """The same but for units of rows that have their own say: one expert with weight 1, or none."""
    alone, by_base = (speaker >= 0)[:, None], (speaker == BASE)[:, None]
    if experts is None:
        own = F.one_hot(speaker.clamp_min(0), num_experts).to(weights.dtype)
    else:
        places = torch.arange(experts.shape[1], device=experts.device)
        # The other places need other experts, of weight 0, so that no expert is there twice.
        experts = torch.where(alone, (speaker.clamp_min(0)[:, None] + places) % num_experts, experts)
        own = (places == 0).to(weights.dtype).expand_as(weights)
    return experts, torch.where(alone, own, weights).masked_fill(by_base, 0.0)


def _is_few(slots: Float[Tensor, " slots"]) -> bool:
    """Whether the host may look at what was decided: asking a GPU would stop it, and a compiler has nothing to see."""
    is_seen = slots.device.type == "cpu" and not isinstance(slots, FakeTensor) and not torch.compiler.is_compiling()
    return is_seen and slots.numel() <= FEW_SLOTS and not torch.is_grad_enabled()


def _any(mask: Bool[Tensor, " units"]) -> bool:
    """Where there are no values, as in an estimate of memory, the answer that costs more."""
    return isinstance(mask, FakeTensor) or bool(mask.any())
