"""Leaves out rows that teach the wrong thing: broken text, cut answers, copies, and prompts that validation asks.

Every function takes examples and gives the places of those to keep, in order, and of those removed, each with its
reason. They remove only what is surely wrong: a rule that also hits good rows costs more than the bad rows it finds.
Examples are read one at a time, when they are needed: there may be more of them than fit into memory.
"""

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dylora_moe.data.example import Example, Message
from dylora_moe.data.similarity import SimilarTexts

Reason = Literal["encoding", "empty", "truncated", "duplicate", "near_duplicate", "leak"]

# Of word runs, for prompt and answer each. Lee et al. (arXiv 2107.06499) and SlimPajama take 0.8, too.
SIMILARITY = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A row that was left out.

    Attributes:
        index: Its place in the list given, from 0.
        reason: The rule.
        detail: What the rule found.
        other: The row that it is too much like: the name of its list, empty for the same one, and its place there.
    """

    index: int
    reason: Reason
    detail: str
    other: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """Places of the rows to go on with, and the rows left out, both in the order of the rows given."""

    kept: NDArray[np.int64]
    removed: tuple[Removed, ...]


def remove_broken(examples: Sequence[Example]) -> Cleaned:
    """Leave out rows with wrongly decoded text, and answers that are empty or cut off."""
    faults: dict[int, Removed] = {}
    for index, example in enumerate(examples):
        if found := find_fault(example):
            faults[index] = Removed(index=index, reason=found[0], detail=found[1])
    return _sort_out(faults, len(examples))


def remove_duplicates(
    examples: Sequence[Example], *, similarity: float | None = SIMILARITY, scratch: Path | None = None
) -> Cleaned:
    """Leave out rows that an earlier row repeats, word for word or nearly; equal prompts may have several answers.

    Args:
        examples: All rows among which there shall be no copies.
        similarity: Both prompt and answer must be at least as similar; None for exact copies only.
        scratch: Folder for files that are removed again; the system's own if None.
    """
    faults: dict[int, Removed] = {}
    firsts = _first_equal(np.fromiter(map(_digest, examples), dtype=np.uint64, count=len(examples)))
    for index in np.flatnonzero(firsts != np.arange(len(firsts))).tolist():
        first = int(firsts[index])
        if examples[index].messages == examples[first].messages:
            faults[index] = Removed(index=index, reason="duplicate", detail="the same as", other=("", first))
    if similarity is not None:
        originals = _without(faults, len(examples))
        for index, other, found in _near_copies(examples, originals, similarity, scratch):
            detail = f"{found:.2f} like"
            faults[index] = Removed(index=index, reason="near_duplicate", detail=detail, other=("", other))
    return _sort_out(faults, len(examples))


def remove_leaks(
    examples: Sequence[Example],
    held_out: Mapping[str, Sequence[Example]],
    *,
    similarity: float | None = SIMILARITY,
    scratch: Path | None = None,
) -> Cleaned:
    """Leave out rows whose prompt a held-out row has, word for word or nearly, whatever its answer or domain.

    Args:
        examples: Training rows.
        held_out: Name of a part, such as `validation` -> its rows.
        similarity: Of the prompts, at least; None for equal prompts only.
        scratch: Folder for files that are removed again; the system's own if None.
    """
    starts = dict(zip(held_out, accumulate(map(len, held_out.values()), initial=0), strict=False))
    num_others = sum(map(len, held_out.values()))

    def name(place: int) -> tuple[str, int]:
        part = next(part for part in reversed(starts) if starts[part] <= place)
        return part, place - starts[part]

    def read(place: int) -> tuple[str]:
        """The prompt of a row, the held-out ones first."""
        if place >= num_others:
            return (_asked(examples[place - num_others]),)
        part, index = name(place)
        return (_asked(held_out[part][index]),)

    faults: dict[int, Removed] = {}
    digests = np.fromiter((_short_digest(*read(place)) for place in range(num_others)), np.uint64, num_others)
    digests, places = np.unique(digests, return_index=True)
    for index, example in enumerate(examples):
        for text in _all_asked(example):
            digest = _short_digest(text)
            at = int(np.searchsorted(digests, np.uint64(digest)))
            if at < len(digests) and digests[at] == digest and read(place := int(places[at])) == (text,):
                faults[index] = Removed(index=index, reason="leak", detail="the prompt of", other=name(place))
                break
    if similarity is not None and num_others:
        count = num_others + len(examples)
        is_held_out = np.arange(count) < num_others
        with TemporaryFile(dir=scratch) as file:
            texts = SimilarTexts(read, count, file)
            for index in _without(faults, len(examples)).tolist():
                found = texts.find_earlier(num_others + index, threshold=similarity, allowed=is_held_out)
                if found is not None:
                    detail = f"prompt {found[1]:.2f} like that of"
                    faults[index] = Removed(index=index, reason="leak", detail=detail, other=name(found[0]))
    return _sort_out(faults, len(examples))


def _sort_out(faults: Mapping[int, Removed], count: int) -> Cleaned:
    return Cleaned(kept=_without(faults, count), removed=tuple(faults[index] for index in sorted(faults)))


def _without(faults: Mapping[int, Removed], count: int) -> NDArray[np.int64]:
    """Places of the rows without fault."""
    kept = np.ones(count, dtype=np.bool_)
    kept[list(faults)] = False
    return np.flatnonzero(kept)


def _first_equal(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each value the place of the first that is equal."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)]
    firsts = np.empty_like(order)
    firsts[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return firsts


def _prompt_text(example: Example) -> str:
    """The user's and the assistant's turns: a system message that all rows share says nothing about a row."""
    return _text(example.prompt)


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages if message.role != "system")


def _asked(example: Example) -> str:
    """What must not be on both sides: the prompt, or the text itself where there is none."""
    prompt = _prompt_text(example)
    return prompt if prompt.strip() else example.answer


def _all_asked(example: Example) -> Iterator[str]:
    """What comes before each answer of a conversation, all of which may be learned; the last answer's first."""
    yield _asked(example)
    for index, message in enumerate(example.prompt):
        if message.role == "assistant" and (text := _text(example.messages[:index])).strip():
            yield text


def _digest(example: Example) -> int:
    return _short_digest(*(part for message in example.messages for part in (message.role, message.content)))


def _short_digest(*texts: str) -> int:
    """64 bits: texts of which they differ differ, and those of which they do not are to be compared."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        content = text.encode()
        digest.update(f"{len(content)} ".encode() + content)
    return int.from_bytes(digest.digest(), "big")


def _near_copies(
    examples: Sequence[Example], originals: NDArray[np.int64], similarity: float, scratch: Path | None
) -> Iterator[tuple[int, int, float]]:
    """(row, earlier row that stays, similarity) of the rows that are nearly copies."""

    def read(place: int) -> tuple[str, str]:
        example = examples[int(originals[place])]
        return _prompt_text(example), example.answer

    stays = np.ones(len(originals), dtype=np.bool_)
    with TemporaryFile(dir=scratch) as file:
        texts = SimilarTexts(read, len(originals), file)
        for place, index in enumerate(originals.tolist()):
            found = texts.find_earlier(place, threshold=similarity, allowed=stays)
            if found is not None:
                stays[place] = False
                yield index, int(originals[found[0]]), found[1]


def find_fault(example: Example) -> tuple[Reason, str] | None:
    """The first of the rules on text that a row breaks, and what was found."""
    for message in example.messages:
        if wrong := find_wrong_encoding(message.content):
            return "encoding", f"{wrong} in the {message.role}'s text"
    if empty := find_emptiness(example.answer):
        return "empty", empty
    if cut := find_cut(example.answer):
        return "truncated", cut
    return None


# What UTF-8's bytes 0x80 to 0xBF become when they are read as Latin-1 or Windows-1252.
_TAIL = (
    r"[\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d\u2018\u2019\u201c"
    r"\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
)
# Letters with accents and signs; punctuation and symbols; emoji; at least three letters of Greek or Cyrillic.
_MOJIBAKE = re.compile(
    rf"[\u00c2\u00c3]{_TAIL}|[\u00e2\u00ef]{_TAIL}{{2}}|\u00f0[\u009f\u0178]{_TAIL}{{2}}|(?:[\u00ce-\u00d1]{_TAIL}){{3}}"
)
# Tab, line ends and form feed are no fault; U+FFFD stands for what could not be decoded.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff]")


def find_wrong_encoding(text: str) -> str | None:
    """What shows that the text was decoded wrongly: replacement and control characters, UTF-8 read as Latin-1."""
    if not text.isascii() and (found := _MOJIBAKE.search(text)):
        return f"UTF-8 read as Latin-1, {found.group()!a}"
    if found := _FORBIDDEN.search(text):
        return f"character {found.group()!a}"
    return None


_FENCE = re.compile(r"[ \t]*(?P<marks>`{3,}|~{3,})(?P<rest>.*)")
# What converters and generators leave where there was no answer.
_PLACEHOLDERS = frozenset({"<nooutput>", "<no output>", "<noanswer>", "[no output]", "[empty]", "<empty>", "nan"})


def find_emptiness(answer: str) -> str | None:
    """What shows that an answer says nothing: a placeholder, or a code block without code."""
    bare = answer.strip()
    if bare.casefold() in _PLACEHOLDERS:
        return f"the placeholder {bare}"
    if not bare.strip("`~ \t\r\n") or (bare.startswith("```") and not _without_fences(bare).strip()):
        return "no text but code fences"
    return None


def _without_fences(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not _FENCE.fullmatch(line))


# No sentence ends in one of these, and no code: "a" is a variable, and "to", "in" or "with" may end a sentence.
_OPEN_WORDS = frozenset(["an", "the", "and", "or", "of", "from", "because", "although", "whose", "your", "my", "their"])
_MIN_WORDS = 12
_LAST_WORD = re.compile(r"[A-Za-z]+\Z")
_LONGEST_WORD = 40


def find_cut(answer: str) -> str | None:
    """What shows that an answer was cut off; None where it may be whole."""
    text = answer.rstrip()
    if _has_open_fence(text):
        return "a code block is not closed"
    if text.endswith(("(", "[", "{")) and len(text.split()) >= _MIN_WORDS:
        return f"it ends in {text[-1]!r}"
    word = _LAST_WORD.search(text[-_LONGEST_WORD:])
    if word and word.group() in _OPEN_WORDS and len(text.split()) >= _MIN_WORDS:
        return f"it ends in {word.group()!r}"
    return _find_cut_python(text)


def _has_open_fence(text: str) -> bool:
    """Whether a code fence lacks its end. Source: CommonMark 0.31, fenced code blocks, at any indentation."""
    opened = ""
    for line in text.splitlines():
        fence = _FENCE.fullmatch(line)
        if fence is None:
            continue
        marks, rest = fence["marks"], fence["rest"].strip()
        if opened:
            if marks[0] == opened[0] and len(marks) >= len(opened) and not rest:
                opened = ""
        elif "`" not in rest:
            opened = marks
    return bool(opened)


# Not other languages: a class of Python has a colon, and its imports have neither quotes nor semicolons.
_PYTHON_START = re.compile(
    r"(?:async )?def +\w+|class +\w+[^{\n]*:[ \t]*\n|(?:import|from) +[\w., ]+\n|@\w+.*\n|if __name__|#!.*python"
)
# What CPython 3.10 to 3.14 say at the end of code that goes on.
_UNFINISHED = re.compile(
    r"'[(\[{]' was never closed|unterminated triple-quoted|unterminated string|expected an indented block"
    r"|expected ':'|unexpected EOF|expected 'except'"
)


def _find_cut_python(text: str) -> str | None:
    """What Python says about code that stops in the middle, if the text is Python."""
    if not _PYTHON_START.match(text) or "\n" not in text:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on escapes in the code that is looked at
        try:
            ast.parse(text)
        except SyntaxError as error:
            at_end = (error.lineno or 0) >= len(text.splitlines()) or "never closed" in (error.msg or "")
            if at_end and _UNFINISHED.search(error.msg or ""):
                return f"Python stops in the middle: {error.msg}"
        except (ValueError, RecursionError, MemoryError):  # null bytes, or deeper than the parser goes
            return None
    return None
