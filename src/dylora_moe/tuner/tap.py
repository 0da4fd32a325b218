"""From the base's forward pass to decisions: hooks that read hidden states where the router sits.

The decoder's pre-hook notes which tokens are real, which document and which prompt each belongs to; the pre-hook
of a decoder layer with a router turns its input into a `Decision`. Under gradient checkpointing hooks of layers run
once a pass, or (transformers before 5.23) again when a layer is recomputed, on the layout that is replayed for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner.config import RoutingConfig
from dylora_moe.tuner.prototype import PrototypeRouter, Router, mixed_gates
from dylora_moe.tuner.router import LinearRouter, dense_gates, sparse_gates
from dylora_moe.tuner.routing import BASE, Decision, Layout, RoutingState, make_dispatch, runs_of_few


def find_documents(
    shape: tuple[int, int], position_ids: Tensor | None, attention_mask: Tensor | None, device: torch.device
) -> Int[Tensor, "batch tokens"]:
    """Document index of each token: rows are packed when positions restart and no attention mask is given."""
    if position_ids is None or attention_mask is not None:
        return torch.zeros(shape, dtype=torch.long, device=device)
    starts = position_ids.expand(shape) == 0
    return (starts.long().cumsum(1) - 1).clamp_min(0)


def prompt_of_labels(
    labels: Int[Tensor, "batch tokens"], document: Int[Tensor, "batch tokens"]
) -> Bool[Tensor, "batch tokens"]:
    """Tokens before the first trained label of their document."""
    trained = labels != -100
    before = torch.zeros_like(trained)
    for index in range(int(document.max()) + 1):
        inside = document == index
        before |= inside & ((trained & inside).long().cumsum(1) == 0)
    return before


def first_tokens(
    valid: Bool[Tensor, "batch tokens"], document: Int[Tensor, "batch tokens"], count: int
) -> Bool[Tensor, "batch tokens"]:
    """The first `count` real tokens of each document."""
    first = torch.zeros_like(valid)
    for index in range(int(document.max()) + 1):
        inside = valid & (document == index)
        first |= inside & (inside.long().cumsum(1) <= count)
    return first


def pool_prompts(
    features: Float[Tensor, "batch tokens features"], layout: Layout
) -> tuple[Float[Tensor, "units features"], Bool[Tensor, " units"]]:
    """Mean feature of each document's prompt, float32, (batch * documents_per_row); and which documents exist."""
    documents = torch.arange(layout.documents_per_row, device=features.device)
    member = layout.document[:, None, :] == documents[None, :, None]
    prompt = (member & layout.prompt[:, None, :]).float()
    pooled = torch.bmm(prompt, features.float()) / prompt.sum(-1, keepdim=True).clamp_min(1)
    exists = (member & layout.valid[:, None, :]).any(-1)
    return pooled.flatten(0, 1), exists.flatten()


# Slots of a pass without gradients up to which one product for each expert that has any is the cheapest on a CPU.
_FEW_SLOTS = 32


class _Reached(Exception):
    """The layer whose input was wanted is reached; the layers above need not run."""


def mean_prompts(decoder: nn.Module, layer: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch features"]:
    """Mean input of a layer over each row's prompt, float32, on the CPU; that layer and those above do not run.

    Args:
        decoder: Whose layer it is.
        layer: The layer.
        batch: input_ids, attention_mask and labels, (batch, tokens), one document a row.

    Raises:
        TunerError: A row has no token before its first label.
    """
    device = next(decoder.parameters()).device
    ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
    document, valid = torch.zeros_like(labels), mask.bool()
    prompt = prompt_of_labels(labels, document) & valid
    if not bool(prompt.any(1).all()):
        row = int((~prompt.any(1)).nonzero()[0])
        raise TunerError(f"a row must have a prompt before its first label to be known by, and row {row} has none.")
    length = int(prompt.any(0).nonzero().max()) + 1  # later tokens change nothing before them
    layout = Layout(valid=valid[:, :length], document=document[:, :length], prompt=prompt[:, :length])
    found: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    try:
        with suppress(_Reached):
            decoder(input_ids=ids[:, :length], attention_mask=mask[:, :length], use_cache=False)
    finally:
        handle.remove()
    return pool_prompts(found[0], layout)[0].cpu()


class Tap:
    """Owns the hooks; makes a decision for each router in each pass and puts it into the routing state."""

    def __init__(
        self,
        decoder: nn.Module,
        layers: nn.ModuleList,
        routers: Mapping[int | None, Router],
        config: RoutingConfig,
        state: RoutingState,
        maturity: Callable[[], float],
    ) -> None:
        self.config, self.state, self.maturity = config, state, maturity
        self._has_routers = bool(routers)
        self.on_features: Callable[[int | None, Tensor], None] | None = None
        self._prompt: Tensor | None = None
        self._real: Tensor | None = None
        self._generating, self._is_first, self._prompt_length = False, False, None
        self._filled_cache: Any = None
        self._kept: WeakKeyDictionary[Any, dict[int | None, tuple[Tensor, Tensor | None]]] = WeakKeyDictionary()
        self._handles = [
            decoder.register_forward_pre_hook(self._start, with_kwargs=True),
            decoder.register_forward_hook(self._finish, always_call=True),
        ]
        for key, router in routers.items():
            layer = layers[config.tap_layer if key is None else key]
            self._handles.append(layer.register_forward_pre_hook(self._hook(key, router), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off the base."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def reading(self, prompt: Tensor | None, real: Tensor | None) -> Iterator[None]:
        """Say which tokens are prompts and which no padding, (batch, tokens) bool, for the passes inside the block."""
        self._prompt, self._real = prompt, real
        try:
            yield
        finally:
            self._prompt = self._real = None

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside the block, the tokens of the first pass are the prompt of every later one."""
        self._generating, self._is_first, self._prompt_length = True, True, None
        try:
            yield
        finally:
            self._generating, self._is_first, self._prompt_length = False, False, None

    def join(self, cache: Any, parts: Sequence[tuple[Any, Sequence[int]]]) -> None:
        """Remember for a cache what was decided for rows of others: of each one its rows that are there, in order."""
        if self.config.granularity == "token" or not self._has_routers:
            return
        kept: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        for key in self._kept[parts[0][0]]:
            found = [(self._kept[part][key], list(rows)) for part, rows in parts]
            logits = torch.cat([logits[rows] for (logits, _), rows in found])
            surely = [sure[rows] for (_, sure), rows in found if sure is not None]
            kept[key] = logits, torch.cat(surely) if surely else None
        self._kept[cache] = kept

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state.decisions = {}
        if not self._generating or self._is_first:
            self.state.passes, self._is_first = [], False
        self.state.passes.append(self.state.decisions)
        if self.state.disabled or self.state.forced is not None:
            return
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        shape, device = (tokens.shape[0], tokens.shape[1]), tokens.device
        cache = kwargs.get("past_key_values")
        # Asked here, before the layers below the tap add this pass's tokens to it.
        self._filled_cache = cache if cache is not None and cache.get_seq_length() > 0 else None
        self.state.layout = self._read_layout(shape, device, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        if self.state.rows is not None and not self._has_routers:
            self.state.decisions[None] = self._without_router(self.state.layout)

    def _read_layout(
        self, shape: tuple[int, int], device: torch.device, mask: Any, position_ids: Tensor | None
    ) -> Layout:
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            valid = torch.ones(shape, dtype=torch.bool, device=device)
            if mask is not None:
                valid = mask[:, -shape[1] :].to(device).bool()
        elif self.config.granularity == "sequence":
            raise TunerError(
                "sequence granularity needs an attention_mask of shape (batch, tokens) to tell prompts from padding, "
                f"got {type(mask).__name__}. Pass the 2-D mask, or use a dynamic cache."
            )
        else:
            valid = torch.ones(shape, dtype=torch.bool, device=device)
        if self._real is not None:
            valid = valid & self._real.to(device)
        document = find_documents(shape, position_ids, mask, device)
        return Layout(valid=valid, document=document, prompt=self._find_prompt(valid, document))

    def _find_prompt(self, valid: Tensor, document: Tensor) -> Tensor:
        if self.config.granularity == "token":
            return valid
        if self._generating:
            if self._prompt_length is None:
                self._prompt_length = valid.shape[1]
            return valid & (torch.arange(valid.shape[1], device=valid.device) < self._prompt_length)
        prefix = first_tokens(valid, document, self.config.prefix_tokens)
        if self._prompt is None:
            return prefix
        prompt = self._prompt.to(valid.device) & valid
        members = document[:, None, :] == torch.arange(int(document.max()) + 1, device=valid.device)[None, :, None]
        has_prompt = (members & prompt[:, None, :]).any(-1).gather(1, document)
        return torch.where(has_prompt, prompt, prefix)

    def _hook(self, key: int | None, router: Router) -> Callable[..., None]:
        def decide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layout = self.state.layout
            if layout is None:
                return
            features = args[0] if args else kwargs["hidden_states"]
            if key is None:
                features = features.detach()  # a function of the frozen base alone
            self.state.decisions[key] = decision = self._decide(key, router, features, layout)
            if self.state.is_replayed:
                return
            if self.on_features is not None:
                self.on_features(key, self._units(features, layout))
            if self.state.recorded is not None:
                self.state.recorded.append(decision)

        return decide

    def _decide(self, key: int | None, router: Router, features: Tensor, layout: Layout) -> Decision:
        batch, tokens, width = features.shape
        rows = torch.arange(batch, device=features.device)
        if self.config.granularity == "token":
            logits, valid, sure = router(features.reshape(-1, width)), layout.valid.reshape(-1), None
            row_of_unit, unit_of_token = rows.repeat_interleave(tokens), None
        else:
            logits, valid, sure = self._judge_documents(key, router, features, layout)
            per_row = logits.shape[0] // batch
            row_of_unit = rows.repeat_interleave(per_row)
            unit_of_token = (rows[:, None] * per_row + layout.document).reshape(-1)
        maturity = self.maturity()
        return make_decision(
            logits,
            valid,
            row_of_unit,
            unit_of_token,
            self.config,
            dense=maturity < 1 or self.state.dense,
            temperature=self._temperature(router, maturity),
            sure=sure,
            speakers=self._speakers(batch, features.device),
        )

    def _without_router(self, layout: Layout) -> Decision:
        """One expert alone, or the base, by rows; each row is one unit."""
        batch, tokens = layout.valid.shape
        rows = torch.arange(batch, device=layout.valid.device)
        return make_decision(
            torch.zeros(batch, 1, device=rows.device),
            layout.valid.any(1),
            rows,
            rows.repeat_interleave(tokens),
            replace(self.config, top_k=1),
            dense=False,
            speakers=self._speakers(batch, rows.device),
        )

    def _speakers(self, batch: int, device: torch.device) -> Tensor | None:
        rows = self.state.rows
        if rows is None:
            return None
        if len(rows) != batch:
            raise TunerError(
                f"rows that have their own say must be as many as the batch has, {batch}, got {len(rows)}."
            )
        return rows.to(device)

    def _temperature(self, router: Router, maturity: float) -> float | Tensor:
        """Of weights over all experts; while one is immature on its way to 1, the logits as they are."""
        start = self.config.temperature
        if isinstance(router, LinearRouter):
            return start ** (1 - maturity) if maturity < 1 else start
        if maturity == 1 and self.config.unsure != "dense" and not self.state.dense:
            return start  # asked of no one
        start = start * router.spread()
        return (start * (1 - maturity)).clamp_min(1.0) if maturity < 1 else start

    def _units(self, features: Tensor, layout: Layout) -> Tensor:
        """What the router reads, (units, features), padding left out."""
        if self.config.granularity == "token":
            return features[layout.valid].float()
        pooled, exists = pool_prompts(features, layout)
        return pooled[exists]

    def _judge_documents(
        self, key: int | None, router: Router, features: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of each document, which exist, and which are sure; as made at prefill once the cache holds tokens."""
        if self._filled_cache is not None:
            kept = self._kept.get(self._filled_cache)
            if kept is None or kept[key][0].shape[0] != features.shape[0]:
                raise TunerError(
                    "the cache holds tokens that this model did not route in a batch of "
                    f"{features.shape[0]} rows. Start from an empty cache, so that the decision is made at prefill."
                )
            logits, sure = kept[key]
            return logits, torch.ones(features.shape[0], dtype=torch.bool, device=features.device), sure
        pooled, exists = pool_prompts(features, layout)
        if isinstance(router, PrototypeRouter):
            logits, sure = router.judge(pooled)
            return logits, exists, sure
        return router(pooled), exists, None

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self.config.granularity == "sequence" and self.state.decisions:
            made = self.state.decisions.items()
            self._kept[cache] = {key: (decision.logits.detach(), decision.sure) for key, decision in made}
        self.state.layout = self._filled_cache = None


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
    return is_seen and slots.numel() <= _FEW_SLOTS and not torch.is_grad_enabled()


def _any(mask: Bool[Tensor, " units"]) -> bool:
    """Where there are no values, as in an estimate of memory, the answer that costs more."""
    return isinstance(mask, FakeTensor) or bool(mask.any())
