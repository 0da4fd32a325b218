"""From the base's forward pass to decisions: hooks that read hidden states where the router sits.

The decoder's pre-hook notes which tokens are real, which document and which prompt each belongs to; the pre-hook
of a decoder layer with a router turns its input into a `Decision`. Under gradient checkpointing hooks of layers run
once a pass, or (transformers before 5.23) again when a layer is recomputed, on the layout that is replayed for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dylora_moe.errors import TunerError
from dylora_moe.tuner.config import RoutingConfig
from dylora_moe.tuner.decide import make_decision
from dylora_moe.tuner.prototype import PrototypeRouter, Router
from dylora_moe.tuner.router import LinearRouter
from dylora_moe.tuner.routing import Decision, Layout, RoutingState


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What was decided for the documents whose tokens a cache holds."""

    logits: Tensor
    sure: Tensor | None
    step: Decision | None = None
    """Of a pass of one token a document; the next such pass has the same."""
    rows: Tensor | None = None
    """The rows' own say in that pass."""


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
        self._kept: WeakKeyDictionary[Any, dict[int | None, _Judged]] = WeakKeyDictionary()
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
        kept: dict[int | None, _Judged] = {}
        for key in self._kept[parts[0][0]]:
            found = [(self._kept[part][key], list(rows)) for part, rows in parts]
            logits = torch.cat([judged.logits[rows] for judged, rows in found])
            surely = [judged.sure[rows] for judged, rows in found if judged.sure is not None]
            kept[key] = _Judged(logits=logits, sure=torch.cat(surely) if surely else None)
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
        if self.config.granularity == "token" or self._filled_cache is not None:
            return valid  # each token decides for itself, or what was decided at prefill goes on
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
        maturity = self.maturity()
        dense = maturity < 1 or self.state.dense
        if tokens == 1 and not dense and (step := self._step_before(key, batch)) is not None:
            return step
        rows = torch.arange(batch, device=features.device)
        if self.config.granularity == "token":
            logits, valid, sure = router(features.reshape(-1, width)), layout.valid.reshape(-1), None
            row_of_unit, unit_of_token = rows.repeat_interleave(tokens), None
        else:
            logits, valid, sure = self._judge_documents(key, router, features, layout)
            per_row = logits.shape[0] // batch
            row_of_unit = rows.repeat_interleave(per_row)
            unit_of_token = (rows[:, None] * per_row + layout.document).reshape(-1)
        return make_decision(
            logits,
            valid,
            row_of_unit,
            unit_of_token,
            self.config,
            dense=dense,
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
            if kept is None or kept[key].logits.shape[0] != features.shape[0]:
                raise TunerError(
                    "the cache holds tokens that this model did not route in a batch of "
                    f"{features.shape[0]} rows. Start from an empty cache, so that the decision is made at prefill."
                )
            exist = torch.ones(features.shape[0], dtype=torch.bool, device=features.device)
            return kept[key].logits, exist, kept[key].sure
        pooled, exists = pool_prompts(features, layout)
        if isinstance(router, PrototypeRouter):
            logits, sure = router.judge(pooled)
            return logits, exists, sure
        return router(pooled), exists, None

    def _step_before(self, key: int | None, batch: int) -> Decision | None:
        """What the pass before decided for one token of each document of the cache, where nothing has changed."""
        kept = self._kept.get(self._filled_cache) if self._filled_cache is not None else None
        if kept is None or kept[key].rows is not self.state.rows or kept[key].logits.shape[0] != batch:
            return None
        return kept[key].step

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self.config.granularity == "sequence" and self.state.decisions:
            self._kept[cache] = {key: self._judged(decision) for key, decision in self.state.decisions.items()}
        self.state.layout = self._filled_cache = None

    def _judged(self, decision: Decision) -> _Judged:
        documents, of_token = decision.logits.shape[0], decision.unit_of_token
        is_step = self._filled_cache is not None and of_token is not None and of_token.numel() == documents
        return _Judged(
            logits=decision.logits.detach(),
            sure=decision.sure,
            step=decision if is_step and decision.experts is not None and not decision.weights.requires_grad else None,
            rows=self.state.rows,
        )
