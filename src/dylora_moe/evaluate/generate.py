"""Answers of a model to conversations, all in one batch: the likeliest, or drawn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.batching import pad_left, pad_token_id
from dylora_moe.data.example import Message
from dylora_moe.data.templates import render_prompt
from dylora_moe.tuner import Decision, DyLoraModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One generation."""

    prompt: str
    text: str
    tokens: int
    stopped: bool
    """True when it ended with an end token, False when it was cut at the limit."""
    routing: dict[str, float] | None
    """Share of the routing weight that each expert took, prompt included; None where no router decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Answers are drawn, by a seed of their own, and not the likeliest."""

    temperature: float
    top_p: float
    seed: int

    def moved(self, by: int) -> "Sampling":
        """The same with another seed, for another batch."""
        return replace(self, seed=self.seed + by)


def generate_answers(
    model: DyLoraModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    sampling: Sampling | None = None,
) -> list[Answer]:
    """Answers, prompts padded on the left to one length; the model is left in the mode it was in.

    Args:
        model: With its experts forced, disabled or routed, as the caller set it.
        tokenizer: Of the base, with the chat template the model was trained with.
        conversations: Messages up to and without the answer.
        max_new_tokens: The most tokens an answer may have.
        end_token_ids: Any of these ends an answer.
        sampling: How answers are drawn; None for the likeliest, token by token.
    """
    encoded = [tokenizer(render_prompt(c, tokenizer), add_special_tokens=False)["input_ids"] for c in conversations]
    pad = pad_token_id(tokenizer)
    ids, mask = pad_left(encoded, pad, model.device)
    was_training = model.training
    model.eval()
    try:
        with model.recording() as decisions, _drawing(sampling, model.device) as how:
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                **how,
                eos_token_id=list(end_token_ids),
                pad_token_id=pad,
            )
    finally:
        model.train(was_training)
    ends, answers = set(end_token_ids), []
    rows = output[:, ids.shape[1] :].tolist()
    lengths = [next((place for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
    shares = _shares(decisions, max(len(model.routers), 1), lengths)
    for index, (conversation, row, length) in enumerate(zip(conversations, rows, lengths, strict=True)):
        answers.append(
            Answer(
                prompt=conversation[-1].content,
                text=str(tokenizer.decode(row[:length], skip_special_tokens=True)),
                tokens=length,
                stopped=length < len(row),
                routing=None if shares is None else dict(zip(model.expert_names, shares[index], strict=True)),
            )
        )
    return answers


@contextmanager
def _drawing(sampling: Sampling | None, device: torch.device) -> Iterator[dict[str, Any]]:
    """What `generate` takes, random numbers beginning at the seed; those of others go on after the block as before."""
    if sampling is None:
        yield {"do_sample": False}
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def _shares(decisions: Sequence[Decision], routers: int, lengths: Sequence[int]) -> list[list[float]] | None:
    """Each row's routing weight by expert as shares: its prompt, in the first pass, and the tokens of its answer."""
    if not decisions:
        return None
    device = decisions[0].logits.device
    total = torch.zeros(len(lengths), decisions[0].num_experts, device=device)
    for index, decision in enumerate(decisions):
        # The pass after the prompt's reads the first token of the answer, and so on; a row that ended only pads.
        reads = index // routers - 1
        speaks = torch.tensor([reads < length for length in lengths], device=device)
        total.index_add_(0, decision.row_of_unit, decision.load() * speaks[decision.row_of_unit, None])
    return (total / total.sum(1, keepdim=True).clamp_min(1e-9)).tolist()
