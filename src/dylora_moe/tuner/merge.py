"""Experts made from experts: how alike two are, several merged into one, the weights of one as the start of another.

An expert changes a Linear by scaling * B @ A, a matrix of features_out x features_in that is never formed: all is
computed from the factors, in float64 on the CPU, wherever the model is.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner.model import DyLoraModel
from dylora_moe.tuner.prototype import PrototypeRouter
from dylora_moe.tuner.routed import RoutedLinear

_Factors: TypeAlias = tuple[Float[Tensor, "_ features_in"], Float[Tensor, "features_out _"], float]

# Singular values below this share of the largest are rounding of the float32 factors.
_ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What became of a merge."""

    into: str
    """The expert that holds the weighted sum now."""
    removed: tuple[str, ...]
    """Experts that are gone, in the order in which they were named."""
    kept: float
    """Share of the sum that the rank and the Linears of `into` had room for: of its squared Frobenius norm, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decomposed:
    """A change of a Linear as left @ diag(values) @ right, the values falling."""

    left: Float[Tensor, "features_out values"]
    values: Float[Tensor, " values"]
    right: Float[Tensor, "values features_in"]

    def energy(self, rank: int | None = None) -> float:
        """Squared Frobenius norm, of the best approximation of a rank where one is given."""
        return float(self.values[:rank].square().sum())


@torch.no_grad()
def merge_factors(
    factors: Sequence[_Factors], weights: Sequence[float], rank: int, scaling: float
) -> tuple[Float[Tensor, "{rank} features_in"], Float[Tensor, "features_out {rank}"]]:
    """A and B of the given rank such that scaling * B @ A is nearest to sum_i weights_i * scaling_i * B_i @ A_i.

    Each singular value is shared evenly between A and B. What the sum leaves of the rank gets a B of zero, and an A
    that is not, as a new expert has, so that it can still be trained.

    Args:
        factors: A (its rank, features_in), B (features_out, its rank) and scaling of each; at least one.
        weights: One for each.
        rank: Of the result.
        scaling: Of the result, not 0.

    Raises:
        TunerError: nothing to merge, not one finite weight for each, a rank below 1, or a scaling of 0.

    Source: the best approximation is the truncated SVD, Eckart and Young, The approximation of one matrix by another
        of lower rank, 1936.
    """
    if not factors:
        raise TunerError("merging needs the factors of at least one expert, got none.")
    _check_weights(weights, len(factors))
    like = factors[0][0]
    lora_a, lora_b = _compose(_decompose(factors, weights), rank, scaling)
    return lora_a.to(like.device, like.dtype), lora_b.to(like.device, like.dtype)


@torch.no_grad()
def merge_experts(
    model: DyLoraModel, names: Sequence[str], into: str, *, weights: Sequence[float] | None = None
) -> Merged:
    """Put the weighted sum of several experts' changes in the place of one of them, and remove the others.

    `into` keeps its rank, scaling, Linears, maturity and frozen flag: its weights change even when it is frozen. A
    prototype router sends the skills of all of them to it; a linear router keeps its row. An expert that leaves a
    Linear alone counts as zero there.

    Args:
        model: Changed in place, or left as it was when this raises.
        names: Two experts or more.
        into: The one of them that stays.
        weights: One for each name; None for their mean.

    Raises:
        TunerError: names that are not different experts of the model, `into` not among them, not one finite weight
            for each, experts with values that are not finite, or too few experts left for top_k.
    """
    _check_names(model, names, into)
    shares = [1 / len(names)] * len(names) if weights is None else list(weights)
    _check_weights(shares, len(names))
    merged, kept, total = _merged(model, dict(zip(names, shares, strict=True)), into)
    for weight, value in merged:
        weight.copy_(value)  # in place: packed experts share their memory
    removed = tuple(name for name in names if name != into)
    _hand_over_skills(model, removed, into)
    for name in removed:
        model.remove_expert(name)
    return Merged(into=into, removed=removed, kept=min(1.0, kept / total) if total else 1.0)


@torch.no_grad()
def similarity(model: DyLoraModel, one: str, other: str) -> float:
    """Cosine between two experts' changes of the base, all Linears together: -1 to 1, 0 when one changes nothing.

    Raises:
        TunerError: no such expert, or one with values that are not finite.
    """
    check_known(model, one, other)
    inner = energy_one = energy_other = 0.0
    for name, linear in model.routed_linears():
        first, second = _factors(name, linear, one), _factors(name, linear, other)
        energy_one += _inner(first, first)
        energy_other += _inner(second, second)
        inner += _inner(first, second)
    if not (energy_one > 0 and energy_other > 0):
        return 0.0
    cosine = inner / (math.sqrt(energy_one) * math.sqrt(energy_other))
    return max(-1.0, min(1.0, cosine))


@torch.no_grad()
def copy_expert_weights(model: DyLoraModel, source: str, target: str) -> None:
    """Warm start: `target` answers as `source` does from now on.

    Its weights are those of `source`, byte for byte where both have one scaling; otherwise B makes up for it.

    Raises:
        TunerError: no such expert, another rank or other Linears, a frozen target, or one whose scaling is 0.
    """
    check_known(model, source, target)
    if any(expert.frozen for expert in model.experts if expert.name == target):
        raise TunerError(f"a frozen expert keeps its weights, and {target!r} is frozen. Copy to another.")
    _check_alike(model, source, target)
    for _, linear in model.routed_linears():
        if source not in linear.lora_A:
            continue
        (from_a, from_b), (to_a, to_b) = _weights(linear, source), _weights(linear, target)
        ratio = linear.scaling[source] / _not_zero(linear.scaling[target])
        to_a.copy_(from_a)
        to_b.copy_(from_b if ratio == 1 else from_b * ratio)


def _merged(
    model: DyLoraModel, weights: dict[str, float], into: str
) -> tuple[list[tuple[Tensor, Tensor]], float, float]:
    """Each weight of `into` with its new value, and the squared norm of what they keep and of the whole sum."""
    merged: list[tuple[Tensor, Tensor]] = []
    kept = total = 0.0
    for name, linear in model.routed_linears():
        given = {expert: _factors(name, linear, expert) for expert in weights}
        present = {expert: factors for expert, factors in given.items() if factors is not None}
        if not present:
            continue
        whole = _decompose(list(present.values()), [weights[expert] for expert in present])
        total += whole.energy()
        if into in present:
            rank = present[into][0].shape[0]
            kept += whole.energy(rank)
            values = _compose(whole, rank, linear.scaling[into])
            merged += zip(_weights(linear, into), values, strict=True)
    return merged, kept, total


def _decompose(factors: Sequence[_Factors], weights: Sequence[float]) -> _Decomposed:
    """The weighted sum of low-rank products, at the price of their ranks: QR of the factors, SVD of what is between."""
    rows = torch.cat([a.to("cpu", torch.float64) for a, _, _ in factors])
    scales = [weight * scaling for weight, (_, _, scaling) in zip(weights, factors, strict=True)]
    columns = torch.cat(
        [b.to("cpu", torch.float64) * scale for scale, (_, b, _) in zip(scales, factors, strict=True)], 1
    )
    (left, upper), (right, lower) = torch.linalg.qr(columns), torch.linalg.qr(rows.t())
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    return _Decomposed(left=left @ inner_left, values=values, right=inner_right @ right.t())


def _compose(whole: _Decomposed, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B, float64, of the best approximation; the largest element of each row of A is positive."""
    if rank < 1:
        raise TunerError(f"the rank of a merge must be at least 1, got {rank}.")
    scaling = _not_zero(scaling)
    left, values, right = whole.left[:, :rank], whole.values[:rank], whole.right[:rank]
    # An SVD is unique but for these signs.
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    is_rounding = values <= whole.values[0] * _ROUNDING
    root = (values / abs(scaling)).sqrt()
    lora_a = right * signs * torch.where(is_rounding, 1.0, root)[:, None]
    lora_b = left * signs.t() * torch.where(is_rounding, 0.0, root) * math.copysign(1, scaling)
    missing = rank - values.numel()  # a rank above the Linear's own
    return torch.nn.functional.pad(lora_a, (0, 0, 0, missing)), torch.nn.functional.pad(lora_b, (0, missing))


def _inner(one: _Factors | None, other: _Factors | None) -> float:
    """Sum over the elements of the product of two changes of a Linear: tr((B1 A1)^T B2 A2), rank x rank inside."""
    if one is None or other is None:
        return 0.0
    (a1, b1, scaling1), (a2, b2, scaling2) = one, other
    return scaling1 * scaling2 * float(((b1.t() @ b2) * (a1 @ a2.t())).sum())


def _hand_over_skills(model: DyLoraModel, removed: Iterable[str], into: str) -> None:
    numbers = [model.expert_names.index(name) for name in removed]
    for router in model.routers.values():
        if isinstance(router, PrototypeRouter):
            served = router.expert_of_skill
            gone = torch.isin(served, torch.tensor(numbers, device=served.device))
            router.expert_of_skill = torch.where(gone, model.expert_names.index(into), served)


def _weights(linear: RoutedLinear, expert: str) -> tuple[Tensor, Tensor]:
    lora_a: Any = linear.lora_A[expert]
    lora_b: Any = linear.lora_B[expert]
    return lora_a.weight, lora_b.weight


def _factors(name: str, linear: RoutedLinear, expert: str) -> _Factors | None:
    """An expert's A and B, float64 on the CPU, and its scaling; None where it leaves the Linear alone."""
    if expert not in linear.lora_A:
        return None
    lora_a, lora_b = (weight.to("cpu", torch.float64) for weight in _weights(linear, expert))
    if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
        raise TunerError(
            f"an expert's weights must be finite numbers, and those of {expert!r} in {name} are not. "
            "Take it back to an earlier state, or train it again."
        )
    return lora_a, lora_b, float(linear.scaling[expert])


def _not_zero(scaling: float) -> float:
    if scaling == 0:
        raise TunerError("the expert written to must have a scaling other than 0; with 0 it can change nothing.")
    return scaling


def check_known(model: DyLoraModel, *names: str) -> None:
    """See that there are experts of these names.

    Raises:
        TunerError: There are not.
    """
    for name in names:
        if name not in model.expert_names:
            raise TunerError(f"there is no expert {name!r}; there are {', '.join(model.expert_names)}.")


def _check_names(model: DyLoraModel, names: Sequence[str], into: str) -> None:
    check_known(model, *names, into)
    if len(set(names)) != len(names) or len(names) < 2:
        raise TunerError(f"a merge needs two different experts or more, got {', '.join(names) or 'none'}.")
    if into not in names:
        raise TunerError(f"the expert to merge into must be one of {', '.join(names)}, got {into!r}.")
    left, top_k = len(model.expert_names) - len(names) + 1, model.routing_config.top_k
    if left < top_k:
        raise TunerError(f"top_k={top_k} needs as many experts, this merge leaves {left}. Lower top_k first.")


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise TunerError(f"a merge needs one finite weight for each of the {count} experts, got {list(weights)}.")


def _check_alike(model: DyLoraModel, source: str, target: str) -> None:
    shapes: dict[str, dict[str, int]] = {source: {}, target: {}}
    for name, linear in model.routed_linears():
        for expert, ranks in shapes.items():
            if expert in linear.lora_A:
                ranks[name] = _weights(linear, expert)[0].shape[0]
    if shapes[source] != shapes[target]:
        raise TunerError(
            f"a copy of weights needs one rank and the same Linears: {_described(source, shapes[source])}; "
            f"{_described(target, shapes[target])}. Give both the same lora_r and target_modules."
        )


def _described(name: str, ranks: dict[str, int]) -> str:
    parts = sorted({linear.rpartition(".")[2] for linear in ranks})
    wide = ", ".join(str(rank) for rank in sorted(set(ranks.values())))
    return f"{name!r} has rank {wide} in {len(ranks)} Linears ({', '.join(parts)})"
