"""Example -> token ids and labels: answers and their end tokens are learned, unless all is asked for.

A prompt is tokenised exactly as it will be at generation, and an answer on its own after it, so that the
border between the two is the same in training and in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.example import Example
from dylora_moe.data.templates import Ending, ensure_template, find_ending, render, render_prompt
from dylora_moe.errors import DataError

Learn = Literal["answers", "last_answer", "all"]
Overlong = Literal["error", "drop", "truncate", "split"]

IGNORED = -100  # the label that torch's cross_entropy leaves out by default
# What has no prompt is routed by its first tokens, as many as `RoutingConfig.prefix_tokens`: none may be learned that
# had a say in which expert predicts it.
UNLEARNED_START = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """One row as ids.

    Attributes:
        input_ids: The conversation up to the end token of its last answer.
        labels: As long as `input_ids`: the id itself where it is learned, else `IGNORED`.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """How many tokens are learned."""
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def prompt_length(self) -> int:
        """How many ids stand before the first that is learned."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Rows that fit a length, and what became of the others.

    Attributes:
        rows: Each with the index of the row that it is or comes from, in order.
        num_dropped: Rows left out whole: too long under `drop`, or without a label in what was kept.
        num_cut: Rows of which only the beginning was kept (`truncate`), or that became several (`split`).
    """

    rows: tuple[tuple[int, Tokenized], ...]
    num_dropped: int = 0
    num_cut: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A stretch of a rendered conversation; an answer's is learned and may have the end token behind it."""

    text: str
    is_answer: bool = False
    ends: bool = False
    learned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSet:
    """Rows in the order of their examples, and the ids that end an answer: generation stops on these."""

    rows: tuple[Tokenized, ...]
    end_token_ids: tuple[int, ...]


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, learn: Learn = "last_answer"
) -> TokenizedSet:
    """Tokenise examples, without looking at their length (see `fit_to_length`).

    Args:
        examples: Conversations.
        tokenizer: Of the base; without a chat template it is given ours.
        learn: Which tokens are labels: every answer of a conversation, its last answer, or all of its text. Where no
            prompt stands before them, the first `UNLEARNED_START` are no labels.

    Raises:
        DataError: The template fails, does not go on where the prompt ends, or no end token is known.
    """
    ensure_template(tokenizer)
    ending = find_ending(tokenizer)
    if not examples:
        return TokenizedSet(rows=(), end_token_ids=(ending.token_id,))
    conversations = [_pieces(example, tokenizer, ending, learn) for example in examples]
    texts = [piece.text for pieces in conversations for piece in pieces]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows = []
    for example, pieces in zip(examples, conversations, strict=True):
        parts = [(piece, next(ids)) for piece in pieces]
        if any(piece.is_answer and ending.token_id in part for piece, part in parts):
            raise DataError(
                f"{_name(example)}: an answer must not contain the end token {ending.token!r}, as a model "
                "would learn to stop there. Drop the row or spell the token differently."
            )
        row = _join(parts, ending.token_id)
        if learn == "all" or not any(message.content.strip() for message in example.prompt):
            row = _without_start(row)
        check_labels(row, (ending.token_id,), _name(example))
        rows.append(row)
    return TokenizedSet(rows=tuple(rows), end_token_ids=(ending.token_id,))


def tokenize_example(example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Tokenized:
    """Tokenise one example.

    Raises:
        DataError: As `tokenize_examples`, or the row has more than `max_length` tokens.
    """
    rows = tokenize_examples([example], tokenizer).rows
    fit_to_length(rows, max_length=max_length, overlong="error")
    return rows[0]


def _join(parts: Sequence[tuple[_Piece, Sequence[int]]], end: int) -> Tokenized:
    input_ids: list[int] = []
    labels: list[int] = []
    for piece, part in parts:
        ids = [*part, end] if piece.ends else part
        input_ids += ids
        labels += ids if piece.learned else [IGNORED] * len(ids)
    return Tokenized(input_ids=tuple(input_ids), labels=tuple(labels))


def _without_start(row: Tokenized) -> Tokenized:
    """The row with its first labels ignored, but for the last two."""
    begin = row.prompt_length
    end = min(begin + UNLEARNED_START, max(begin, len(row) - 2))
    labels = (*row.labels[:begin], *[IGNORED] * (end - begin), *row.labels[end:])
    return Tokenized(input_ids=row.input_ids, labels=labels)


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase, ending: Ending, learn: Learn) -> list[_Piece]:
    """The conversation as the template writes it, cut at the borders of its answers."""
    turns = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
    pieces: list[_Piece] = []
    done = ""
    for turn in turns if learn == "answers" else turns[-1:]:
        prompt, answer = _prompt_and_answer(example, turn, tokenizer, ending)
        if not prompt.startswith(done):
            raise DataError(
                f"{_name(example)}: the chat template must render a conversation as its beginning with more after it, "
                f"but writes {_parting(done, prompt)!r} where the shorter one ends in {done[-60:]!r}. Mend "
                "tokenizer.chat_template, or learn the last answers only."
            )
        is_last, written = turn == turns[-1], ending.text[len(ending.learned) :].startswith(ending.token)
        pieces.append(_Piece(text=prompt[len(done) :], learned=learn == "all"))
        # A template that writes no end token ends a conversation by one of ours, which stands nowhere else.
        pieces.append(_Piece(text=answer + ending.learned, is_answer=True, ends=is_last or written, learned=True))
        done = prompt + answer + ending.learned + (ending.token if written else "")
    return pieces


def _prompt_and_answer(
    example: Example, turn: int, tokenizer: PreTrainedTokenizerBase, ending: Ending
) -> tuple[str, str]:
    """The rendered messages before an assistant's turn, and the turn's text without what ends it."""
    answer = example.messages[turn].content
    try:
        prompt = render_prompt(example.messages[:turn], tokenizer)
        whole = render(example.messages[: turn + 1], tokenizer, for_generation=False)
    except Exception as error:  # as in find_ending
        raise DataError(f"{_name(example)}: the chat template refuses it ({error}).") from error
    if not whole.startswith(prompt):
        raise DataError(
            f"{_name(example)}: the chat template must render the whole conversation as the prompt with the "
            f"answer after it, but the prompt ends in {prompt[-60:]!r} and the conversation goes on "
            f"{_parting(prompt, whole)!r} there. Mend tokenizer.chat_template."
        )
    written = whole[len(prompt) :].removesuffix(ending.text)
    if not whole.endswith(ending.text) or answer.strip() not in written:
        raise DataError(
            f"{_name(example)}: the chat template must write the answer as it is and {ending.text!r} after "
            f"it, got {whole[len(prompt) :][-200:]!r}. Mend tokenizer.chat_template."
        )
    return prompt, written


def _name(example: Example) -> str:
    return f"Example of {example.source} beginning {example.prompt[-1].content[:50]!r}"


def _parting(prompt: str, whole: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    return whole[same : same + 60]


def check_labels(row: Tokenized, end_token_ids: Sequence[int], name: str) -> None:
    """Stop before training on a row that teaches nothing, or that never teaches a model to stop.

    Raises:
        DataError: It has no label but its end, or its last label is not an end token.
    """
    if row.num_labels < 2:
        learned = [label for label in row.labels if label != IGNORED]
        raise DataError(
            f"{name}: every row must have labels besides its end token, got {learned}. The tokenizer or the template "
            "drops the answer."
        )
    if row.labels[-1] not in end_token_ids:
        raise DataError(
            f"{name}: the last label must be one of the end tokens {list(end_token_ids)}, got {row.labels[-1]}. "
            "A model trained on it would never stop."
        )


def fit_to_length(rows: Sequence[Tokenized], *, max_length: int, overlong: Overlong) -> Fitted:
    """Rows of at most `max_length` tokens.

    Args:
        rows: Rows of any length.
        max_length: The most tokens that a row may have.
        overlong: What becomes of longer rows: `error` stops, `drop` leaves them out, `truncate` keeps their
            beginning, `split` makes rows of `max_length` tokens of them. What has no label left is left out.

    Raises:
        DataError: A row is too long under `error`; the text says which max_length would do.
    """
    kept: list[tuple[int, Tokenized]] = []
    num_dropped = num_cut = 0
    for index, row in enumerate(rows):
        if len(row) <= max_length:
            kept.append((index, row))
            continue
        ends = {"error": 0, "drop": 0, "truncate": max_length, "split": len(row)}[overlong]
        parts = [part for start in range(0, ends, max_length) if (part := _part(row, start, max_length)).num_labels]
        kept += [(index, part) for part in parts]
        num_dropped += not parts
        num_cut += bool(parts)
    if overlong == "error":
        check_lengths(np.array([len(row) for row in rows], dtype=np.int32), max_length)
    return Fitted(rows=tuple(kept), num_dropped=num_dropped, num_cut=num_cut)


def check_lengths(lengths: NDArray[np.int32], max_length: int) -> None:
    """Stop where a row is too long.

    Raises:
        DataError: The text says which max_length would do.
    """
    if num_overlong := int((lengths > max_length).sum()):
        ordered = np.sort(lengths)
        raise DataError(
            f"Rows must have at most max_length={max_length} tokens, but {num_overlong} of "
            f"{len(ordered)} have more; the longest has {ordered[-1]}. max_length={quantile(ordered, 0.99)} "
            f"fits 99 % of the rows, max_length={ordered[-1]} all. Raise it, or set overlong: drop."
        )


def _part(row: Tokenized, start: int, length: int) -> Tokenized:
    """A stretch of a row; one that begins in the middle has no prompt."""
    labels = row.labels[start : start + length]
    if start:
        labels = (IGNORED, *labels[1:])  # predicted from nothing
    part = Tokenized(input_ids=row.input_ids[start : start + length], labels=labels)
    return _without_start(part) if start else part


def quantile(ordered: NDArray[np.int32], fraction: float) -> int:
    """The smallest of the ordered values that at least this fraction of them does not exceed."""
    rank = max(1, -(-len(ordered) * fraction // 1))
    return int(ordered[min(len(ordered), int(rank)) - 1])
