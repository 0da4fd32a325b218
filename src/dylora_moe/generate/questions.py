"""Rows of data sets -> questions that can be asked, and the answers that people gave to them.

What is in a question is data: characters that steer terminals or chat templates are taken out, and counted.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dylora_moe.data.example import Example, Message

# How the templates of common model families begin and end turns; a server reads them in a message, too.
MARKS = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>", re.IGNORECASE
)
# Format characters that reorder or hide text; the joiners that scripts need stay.
_HIDING = {*"\u200b\u2060\ufeff", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Authentic:
    """What a person answered.

    Attributes:
        text: Word for word.
        source: The data set that it came from.
        licence: SPDX identifier of its text, None where unknown.
    """

    text: str
    source: str
    licence: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: a conversation whose last turn is the user's.

    Attributes:
        messages: Its turns, cleaned.
        source: The data set that it came from.
        licence: SPDX identifier of its text, None where unknown.
        answers: What people answered, each text once.
    """

    messages: tuple[Message, ...]
    source: str
    licence: str | None
    answers: tuple[Authentic, ...] = ()

    @property
    def text(self) -> str:
        """The last turn."""
        return self.messages[-1].content


@dataclass(slots=True)
class Cleaned:
    """What was done to questions, each a count of rows; what was read and is not kept is one of the last three."""

    read: int = 0
    control_characters: int = 0
    template_marks: int = 0
    too_long: int = 0
    empty: int = 0
    repeated: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    """One of each kind, its first 80 characters."""

    def note(self, kind: str, text: str) -> None:
        """Count one."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.examples.setdefault(kind, text[:80])


def clean_text(text: str) -> tuple[str, set[str]]:
    """The text without control and hiding characters, marks of chat templates pulled apart, and what was found."""
    found = set[str]()
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    kept = "".join(
        char for char in text if char in "\n\t" or not (unicodedata.category(char) == "Cc" or char in _HIDING)
    )
    if kept != text:
        found.add("control_characters")
    apart = MARKS.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", kept)
    if apart != kept:
        found.add("template_marks")
    return apart.strip(), found


def collect(
    examples: Iterable[Example], *, keep_answers: Mapping[str, bool], max_chars: int
) -> tuple[list[Question], Cleaned]:
    """The questions of examples, each once, in their order, with the answers of sources whose answers are kept.

    Args:
        examples: Any; one that is plain text, with an empty prompt, is a question itself.
        keep_answers: Source -> whether its answers are kept.
        max_chars: Longest question, all turns together.
    """
    counts, places, names = Cleaned(), dict[tuple[str, ...], int](), _names(keep_answers)
    asked: list[tuple[Example, tuple[Message, ...], dict[str, Authentic]]] = []
    for example in examples:
        turns = [turn for turn in example.prompt if turn.role != "system"]
        is_text = not any(turn.content.strip() for turn in turns)
        messages, found = _clean(list(example.messages[-1:]) if is_text else turns)
        counts.read += 1
        text = messages[-1].content if messages else ""
        for kind in sorted(found):
            counts.note(kind, text)
        if not text:
            counts.note("empty", text)
            continue
        if sum(len(turn.content) for turn in messages) > max_chars:
            counts.note("too_long", text)
            continue
        key = tuple(f"{turn.role}: {' '.join(turn.content.lower().split())}" for turn in messages)
        if key in places:
            counts.note("repeated", text)
        place = places.setdefault(key, len(asked))
        if place == len(asked):
            asked.append((example, messages, {}))
        if not is_text and keep_answers[example.source]:
            found_in = Authentic(text=example.answer, source=names[example.source], licence=example.licence)
            asked[place][2].setdefault(example.answer, found_in)
    return [
        Question(
            messages=messages,
            source=names[example.source],
            licence=example.licence,
            answers=tuple(answers.values()),
        )
        for example, messages, answers in asked
    ], counts


def _names(sources: Iterable[str]) -> dict[str, str]:
    """Of data sets: as the registry or the hub has them, or the file's; where it lay is nobody's business.

    Of two files of one name each has its folder's before it.
    """
    paths = {source: Path(source) for source in sources}
    files = {source: path for source, path in paths.items() if path.is_absolute() or path.exists()}
    often = Counter(path.name for path in files.values())
    return {source: source for source in paths} | {
        source: path.name if often[path.name] == 1 else f"{path.absolute().parent.name}/{path.name}"
        for source, path in files.items()
    }


def _clean(turns: Sequence[Message]) -> tuple[tuple[Message, ...], set[str]]:
    found, kept = set[str](), []
    for place, turn in enumerate(turns):
        content, kinds = clean_text(turn.content)
        found |= kinds
        kept.append(Message(role="user" if place == len(turns) - 1 else turn.role, content=content))
    return tuple(kept), found
