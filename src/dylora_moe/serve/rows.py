"""Rows that are answered together: their keys and values, one pass for all, and rows that come and go.

Rows lie at the right end of the cache, so a row's length says where it begins and what is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dylora_moe.data.batching import pad_left
from dylora_moe.errors import ServeError
from dylora_moe.tuner import DyLoraModel

# Tokens that a layer has room for beyond those it holds: it is copied once in so many passes, not in each.
_ROOM = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What one pass gave for each row's last token."""

    logits: Float[Tensor, "rows vocabulary"]
    """Float32, of the next token."""
    gates: list[list[float]]
    """Each expert's weight, the mean over layers; zeros where the base served alone."""


class Rows:
    """Rows with one cache. `speakers` are expert numbers, ROUTED or BASE; `lengths` the tokens that each has read."""

    def __init__(self, model: DyLoraModel, speakers: Sequence[int], lengths: Sequence[int]) -> None:
        self._model = model
        self.speakers, self.lengths = list(speakers), list(lengths)
        self.cache = empty_cache(model)

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    @torch.no_grad()
    def prefilled(
        cls, model: DyLoraModel, prompts: Sequence[Sequence[int]], speakers: Sequence[int], pad_token_id: int
    ) -> tuple["Rows", Served]:
        """Read prompts in one pass, each as if alone."""
        rows = cls(model, speakers, [len(prompt) for prompt in prompts])
        ids, mask = pad_left(prompts, pad_token_id, model.device)
        return rows, rows._pass(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), prompt_mask=mask.bool())

    @torch.no_grad()
    def step(self, ids: Sequence[int]) -> Served:
        """Read one more token of each row."""
        lengths = torch.tensor(self.lengths, device=self._model.device)[:, None]
        longest = max(self.lengths)
        mask = (torch.arange(longest + 1, device=lengths.device) >= longest - lengths).long()
        served = self._pass(torch.tensor(ids, device=lengths.device)[:, None], mask, lengths)
        self.lengths = [length + 1 for length in self.lengths]
        return served

    def _pass(self, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any) -> Served:
        # An index copies the last states. Of a slice, as `logits_to_keep=1` takes it, torch multiplies each row by a
        # copy of its own of the output weights where they are in bfloat16: 0.3 GB and 1.8 s a row of Gemma-3-270M.
        with self._model.by_rows(self.speakers):
            logits = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=torch.tensor([ids.shape[1] - 1], device=ids.device),
                **options,
            ).logits
        gates = self._model.routing()
        assert gates is not None  # rows that have a say are always decided
        return Served(logits=logits[:, -1].float(), gates=gates[:, -1].tolist())

    @staticmethod
    @torch.no_grad()
    def joined(parts: Sequence[tuple["Rows", Sequence[int]]]) -> "Rows":
        """Some rows of each, in order, as one; what all of them have as padding is left out.

        The parts stay as they are.
        """
        model = parts[0][0]._model
        speakers = [rows.speakers[row] for rows, chosen in parts for row in chosen]
        lengths = [rows.lengths[row] for rows, chosen in parts for row in chosen]
        joined = Rows(model, speakers, lengths)
        for number, layer in enumerate(joined.cache.layers):
            held = [(rows.cache.layers[number], list(chosen)) for rows, chosen in parts]
            layer.take(held, max(lengths))
        model.join_decisions(joined.cache, [(rows.cache, list(chosen)) for rows, chosen in parts])
        return joined


class _Roomy(DynamicLayer):
    """Keys and values with room behind them, so that a pass adds its own and copies nothing."""

    window: int | None = None
    """Tokens that are held; None for all."""
    _stores: tuple[Tensor, ...]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the tokens of a pass; give those that they may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = key_states[:, :, :0], value_states[:, :, :0]
            self._first = self._end = 0
        new = key_states.shape[-2]
        if self._end + new > self._stores[0].shape[-2]:
            held = self._end - self._first
            self._make_room(self._held(), held + new)
            self._first, self._end = 0, held
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, self._end : self._end + new] = states
        self._end += new
        seen = self._held()
        if self.window is not None:
            self._first = max(self._first, self._end - self.window)
        self.keys, self.values = self._held()
        return seen

    def take(self, parts: Sequence[tuple["_Roomy", list[int]]], longest: int) -> None:
        """Hold rows of other layers, the longest of which has read so many tokens."""
        width = longest if self.window is None else min(longest, self.window)
        keys, values = parts[0][0]._held()
        self.lazy_initialization(keys, values)
        number = sum(len(rows) for _, rows in parts)
        self._stores = tuple(
            like.new_zeros(number, like.shape[1], width + _ROOM, like.shape[3]) for like in (keys, values)
        )
        self._first, self._end, start = 0, width, 0
        for part, rows in parts:
            index = torch.tensor(rows, device=keys.device)
            for store, states in zip(self._stores, part._held(), strict=True):
                shared = min(width, states.shape[-2])
                kept = states[:, :, states.shape[-2] - shared :]
                store[start : start + len(rows), :, width - shared : width] = kept.index_select(0, index)
            start += len(rows)
        self.keys, self.values = self._held()

    def _held(self) -> tuple[Tensor, Tensor]:
        keys, values = (store[:, :, self._first : self._end] for store in self._stores)
        return keys, values

    def _make_room(self, held: tuple[Tensor, Tensor], tokens: int) -> None:
        stores = []
        for states in held:
            store = states.new_empty(states.shape[0], states.shape[1], tokens + _ROOM, states.shape[3])
            store[:, :, : states.shape[-2]] = states
            stores.append(store)
        self._stores = tuple(stores)


class _RoomySliding(_Roomy, DynamicSlidingWindowLayer):
    """The same of a layer that looks at the last tokens only."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.window = sliding_window - 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As of its parent."""
        seen = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        return seen

    def take(self, parts: Sequence[tuple[_Roomy, list[int]]], longest: int) -> None:
        """As of its parent."""
        super().take(parts, longest)
        self.cumulative_length = longest


def empty_cache(model: DyLoraModel) -> Any:
    """A cache whose rows can come and go.

    Raises:
        ServeError: The base keeps more than keys and values of its tokens, and rows of such a state cannot be padded.
    """
    cache: Any = DynamicCache(config=model.config)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if not known or not cache.layers or "chunked_attention" in kinds:
        raise ServeError(
            "a base to be served must have layers of full or sliding attention only, got "
            f"{', '.join(sorted(kinds)) or type(model.lm).__name__}. `dylora chat` can use it, one question at a time."
        )
    cache.layers = [
        _RoomySliding(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else _Roomy()
        for layer in cache.layers
    ]
    return cache
