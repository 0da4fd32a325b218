"""Rows as a person reads them: every token with its text, and whether it is learned."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.summary import DataSummary
from dylora_moe.data.tokenize import IGNORED

# Tokens before a token that decide how it is written: a space at its start, or the first bytes of its character.
_CONTEXT = 8
_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
SAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenView:
    """One token of a row.

    Attributes:
        id: In the vocabulary.
        text: What it adds to the text; empty where its character is completed by a later token.
        is_learned: Whether it is a label.
        is_special: Whether it is a special token, such as the end of a turn.
    """

    id: int
    text: str
    is_learned: bool
    is_special: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DataView:
    """What goes into a run, and some training rows of each domain."""

    summary: DataSummary
    samples: dict[str, list[tuple[TokenView, ...]]]

    def as_record(self) -> dict[str, Any]:
        """The summary with the samples in it, as JSON has it."""
        samples = {domain: [[asdict(token) for token in row] for row in rows] for domain, rows in self.samples.items()}
        return {**asdict(self.summary), "samples": samples}


def view_data(data: DataBundle, tokenizer: PreTrainedTokenizerBase, *, samples: int = SAMPLES) -> DataView:
    """The summary of data, and this many rows of each domain."""
    picked = pick_rows(data, samples)
    views = {domain: [view_row(row, tokenizer) for row in rows] for domain, rows in picked.items()}
    return DataView(summary=data.summary, samples=views)


def view_row(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenView, ...]:
    """Every token of a row; their texts joined are the row's text."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    views = []
    for index, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
        start = max(0, index - _CONTEXT)
        before = _decode(row.input_ids[start:index], tokenizer).rstrip(_HALF_A_CHARACTER)
        now = _decode(row.input_ids[start : index + 1], tokenizer)
        text = "" if now.endswith(_HALF_A_CHARACTER) else now[len(before) :]
        views.append(TokenView(id=token, text=text, is_learned=label != IGNORED, is_special=token in special))
    return tuple(views)


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def pick_rows(data: DataBundle, count: int) -> dict[str, list[TokenizedRow]]:
    """For each domain some training rows, from short to long, the extremes left out."""
    picked = {}
    for index, domain in enumerate(data.domains):
        places = data.train.of_domain(index)
        places = places[data.train.lengths[places].argsort(kind="stable")]
        number = len(places)
        picked[domain] = [
            data.train[int(places[(2 * place + 1) * number // (2 * count)])] for place in range(min(count, number))
        ]
    return picked
