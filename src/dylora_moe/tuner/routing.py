"""What was decided in one forward pass: which experts each token goes to, with which weights.

A `Decision` is made by a router and read by every adapted Linear. `RoutingState` carries the decisions of the
pass under way from the router to the Linears, and keeps them until the next pass for whoever asks.
"""

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Of a row that has its own say: the router decides, or the base answers alone. Other numbers are those of experts.
ROUTED, BASE = -1, -2
# Tokens of one expert up to which a product each is cheaper than one for all, measured at r = 8 and 16.
_EACH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Tokens sorted by expert, shared by all Linears that use one decision.

    A *slot* is one (token, chosen expert) pair; there are tokens * top_k of them.
    """

    token_of_slot: Int[Tensor, " slots"]
    """Token that each sorted slot reads."""
    slot_order: Int[Tensor, " slots"]
    """Sorted slot -> slot in (token, choice) order."""
    sorted_of_slot: Int[Tensor, " slots"]
    """Inverse of `slot_order`."""
    expert_of_slot: Int[Tensor, " slots"]
    """Expert of each sorted slot, ascending."""
    offsets: Int[Tensor, " experts"]
    """End of each expert's run of slots, int32 as `grouped_mm` wants it."""


def make_dispatch(experts: Int[Tensor, "tokens top_k"], num_experts: int) -> Dispatch:
    """Sort the (token, expert) pairs by expert, stably, without a host synchronisation."""
    top_k = experts.shape[1]
    flat = experts.reshape(-1)
    expert_of_slot, order = flat.sort(stable=True)
    positions = torch.arange(flat.numel(), device=flat.device)
    inverse = torch.empty_like(order).scatter_(0, order, positions)
    bounds = torch.arange(num_experts, device=flat.device, dtype=expert_of_slot.dtype)
    offsets = torch.searchsorted(expert_of_slot, bounds, right=True).to(torch.int32)
    return Dispatch(
        token_of_slot=order if top_k == 1 else order // top_k,
        slot_order=order,
        sorted_of_slot=inverse,
        expert_of_slot=expert_of_slot,
        offsets=offsets,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one expert computes in a pass of few tokens, as the host knows it."""

    expert: int
    pairs: tuple[tuple[int, float], ...]
    """Tokens of the flattened batch, each with its weight."""
    device: torch.device
    """Of the batch."""

    @property
    def is_short(self) -> bool:
        """Whether token by token they take less time."""
        return len(self.pairs) <= _EACH

    @cached_property
    def tokens(self) -> Int[Tensor, " run"]:
        """The tokens of `pairs`."""
        return torch.tensor([token for token, _ in self.pairs], device=self.device)

    @cached_property
    def weights(self) -> Float[Tensor, "run 1"]:
        """The weights of `pairs`."""
        return torch.tensor([[weight] for _, weight in self.pairs], dtype=torch.float32, device=self.device)


def runs_of_few(dispatch: Dispatch, slot_weights: Float[Tensor, " slots"]) -> tuple[Run, ...]:
    """What each expert computes, for slots on the CPU; those of weight 0 are left out."""
    experts, tokens, weights = (
        each.tolist() for each in (dispatch.expert_of_slot, dispatch.token_of_slot, slot_weights)
    )
    by_expert: dict[int, list[tuple[int, float]]] = {}
    for expert, token, weight in zip(experts, tokens, weights, strict=True):
        if weight != 0.0:
            by_expert.setdefault(expert, []).append((token, weight))
    return tuple(
        Run(expert=expert, pairs=tuple(pairs), device=slot_weights.device) for expert, pairs in by_expert.items()
    )


@cache
def runs_of_one(expert: int, device: torch.device) -> tuple[Run]:
    """The only token of a pass, all of whose weight is one expert's."""
    return (Run(expert=expert, pairs=((0, 1.0),), device=device),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One router's decision. A *unit* is what gets one decision: a token, or a document."""

    logits: Float[Tensor, "units experts"]
    """Float32, before any softmax."""
    probs: Float[Tensor, "units experts"]
    """Softmax over all experts."""
    experts: Int[Tensor, "units top_k"] | None
    """Chosen experts, best first; None under dense collaboration, where all contribute."""
    weights: Float[Tensor, "units chosen"]
    """Weight of each chosen expert (chosen = top_k), or of every expert when dense; 0 where the base answers."""
    valid: Bool[Tensor, " units"]
    """False for padding: such units never count in a loss or a statistic."""
    unit_of_token: Int[Tensor, " tokens"] | None
    """Unit that decides for each token of the flattened batch; None when every token is its own unit."""
    row_of_unit: Int[Tensor, " units"]
    """Row of the batch that each unit belongs to."""
    dispatch: Dispatch | None
    """Sorted tokens for the sparse executions; None when dense."""
    slot_weights: Float[Tensor, " slots"] | None
    """Weight of each sorted slot, gathered once for all Linears; None when dense."""
    few: tuple[Run, ...] | None = None
    """The same for a pass without gradients of so few tokens that the host tells each expert what to compute."""
    sure: Bool[Tensor, " units"] | None = None
    """Whether a skill is near enough to each unit; None where the router does not say."""

    @property
    def num_experts(self) -> int:
        """Experts that the router chooses from."""
        return self.logits.shape[1]

    def token_weights(self) -> Float[Tensor, "tokens chosen"]:
        """`weights`, one row per token of the flattened batch."""
        return self.weights if self.unit_of_token is None else self.weights.index_select(0, self.unit_of_token)

    def token_experts(self) -> Int[Tensor, "tokens top_k"] | None:
        """`experts`, one row per token of the flattened batch."""
        if self.experts is None or self.unit_of_token is None:
            return self.experts
        return self.experts.index_select(0, self.unit_of_token)

    def token_gates(self) -> Float[Tensor, "tokens experts"]:
        """The weights as a full matrix, zero where an expert was not chosen; differentiable."""
        weights, experts = self.token_weights(), self.token_experts()
        if experts is None:
            return weights
        empty = torch.zeros(weights.shape[0], self.num_experts, dtype=weights.dtype, device=weights.device)
        return empty.scatter(1, experts, weights)

    def load(self) -> Float[Tensor, "units experts"]:
        """Weight that each valid unit gives to each expert, detached; rows sum to 1, of padding and the base to 0."""
        load = torch.zeros_like(self.probs)
        if self.experts is None:
            load = self.weights.detach()
        else:
            load.scatter_(1, self.experts, self.weights.detach())
        return load * self.valid[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where documents and prompts lie in a batch."""

    valid: Bool[Tensor, "batch tokens"]
    """False for padding."""
    document: Int[Tensor, "batch tokens"]
    """Index of the document within its row; all 0 unless rows are packed."""
    prompt: Bool[Tensor, "batch tokens"]
    """Tokens whose features decide for their document, under sequence granularity."""

    @property
    def documents_per_row(self) -> int:
        """The most documents that any row holds; 1 unless rows are packed."""
        return int(self.document.max()) + 1 if self.document.numel() else 1


@dataclass(slots=True)
class RoutingState:
    """The decisions of the pass under way. Key None: shared by all layers; else one per layer index."""

    decisions: dict[int | None, Decision] = field(default_factory=dict)
    layout: Layout | None = None
    """Of the batch under way; None between passes, and where no router decides."""
    is_replayed: bool = False
    """True while gradient checkpointing recomputes a pass."""
    recorded: list[Decision] | None = None
    """Every decision since recording was asked for; None while nobody did."""
    forced: str | None = None
    """Name of the one expert that serves everything, whatever the router says."""
    disabled: bool = False
    """True while the base answers alone."""
    dense: bool = False
    """True while all experts contribute to every unit, mature or not."""
    rows: Int[Tensor, " batch"] | None = None
    """Of each row an expert's number, ROUTED or BASE; None while all rows are routed alike."""
    passes: list[dict[int | None, Decision]] = field(default_factory=list)
    """Decisions of the last pass, or of all passes of the last generation."""

    def decision_for(self, layer: int) -> Decision | None:
        """The decision that the adapted Linears of a layer follow, or None when none was made."""
        shared = self.decisions.get(None)
        return shared if shared is not None else self.decisions.get(layer)

    def replay(self) -> "Replay":
        """What is in force now, to be put back while gradient checkpointing recomputes the layers of this pass."""
        return Replay(self)


class Replay:
    """Puts a routing state back as it was; may be entered again, since a graph may be walked twice."""

    def __init__(self, state: RoutingState) -> None:
        self._state = state
        self._then = self._read()

    def _read(self) -> tuple[Any, ...]:
        state = self._state
        return state.decisions, state.layout, state.forced, state.disabled, state.dense, state.rows

    def _write(self, values: tuple[Any, ...]) -> None:
        state = self._state
        state.decisions, state.layout, state.forced, state.disabled, state.dense, state.rows = values

    def __enter__(self) -> None:
        self._now = self._read()
        self._write(self._then)
        self._state.is_replayed = True

    def __exit__(self, *error: object) -> None:
        self._write(self._now)
        self._state.is_replayed = False
