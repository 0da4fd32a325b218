"""Answers cut from one pattern: openings, endings and frames that many answers share and no question asks for.

Words of its own question say nothing of an answer: a lesson on "in front of" says "in front of". What many answers
share beside them is a formula of whoever wrote them.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

# An opening or ending of so many words, and a frame of four in a row, is a formula where it explains both this share
# of all answers and so many of them. Measured on CIMA's 3,315 replies of people: none is of one, against
# all of ten kinds that were put in, each in 2 % of the answers and more (benchmarks/checks.py, docs/log.md).
_OPENINGS, _ENDINGS, _FRAME = (2, 3, 4), (3, 4), 4
_SHARE, _LEAST = 0.02, 8
# Of a frame's words, those that the question may have; of an answer's words, those that frames must make up.
_ASKED, _COVERED = 2, 0.4
_WORD = re.compile(r"\w+")
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A pattern.

    Attributes:
        text: Its words, with dots where others stand.
        answers: How many are cut from it.
    """

    text: str
    answers: int


def find_skeletons(questions: Sequence[str], answers: Sequence[str]) -> list[str | None]:
    """The pattern that each answer is cut from, the commonest where there are several; None for an answer of its own.

    Args:
        questions: Of each answer, with all that was said before it.
        answers: As many.
    """
    words = [_words(answer) for answer in answers]
    asked = [set(_words(question)) for question in questions]
    found = [list(_parts(each, known)) for each, known in zip(words, asked, strict=True)]
    counts = Counter(part for parts in found for part in set(parts))
    least = max(_LEAST, _SHARE * len(answers))
    return [
        _skeleton([part for part in parts if counts[part] >= least], each, counts)
        for parts, each in zip(found, words, strict=True)
    ]


def most_common(skeletons: Sequence[str | None], number: int) -> list[Skeleton]:
    """The patterns that most answers are cut from."""
    counts = Counter(skeleton for skeleton in skeletons if skeleton is not None)
    return [Skeleton(text=text, answers=count) for text, count in counts.most_common(number)]


_Part = tuple[str, tuple[str, ...]]


def _parts(words: Sequence[str], asked: Collection[str]) -> Iterator[_Part]:
    """What an answer may share with others: its openings, its endings, and its frames."""
    for kind, sizes in (("opening", _OPENINGS), ("ending", _ENDINGS)):
        for size in sizes:
            part = tuple(words[:size] if kind == "opening" else words[-size:])
            if len(part) == size and not all(word in asked for word in part):
                yield kind, part
    for at in range(len(words) - _FRAME + 1):
        part = tuple(words[at : at + _FRAME])
        if sum(word in asked for word in part) <= _ASKED:
            yield "frame", part


def _skeleton(shared: Sequence[_Part], words: Sequence[str], counts: Counter[_Part]) -> str | None:
    edges = [part for part in shared if part[0] != "frame"]
    if edges:
        kind, part = max(edges, key=lambda each: (counts[each], len(each[1])))
        return f"{' '.join(part)} ..." if kind == "opening" else f"... {' '.join(part)}"
    frames = {part for kind, part in shared if kind == "frame"}
    covered = [False] * len(words)
    for at in range(len(words) - _FRAME + 1):
        if tuple(words[at : at + _FRAME]) in frames:
            covered[at : at + _FRAME] = [True] * _FRAME
    if not frames or sum(covered) < _COVERED * len(words):
        return None
    part = max(sorted(frames), key=lambda each: counts["frame", each])
    return f"... {' '.join(part)} ..."


def _words(text: str) -> list[str]:
    return _WORD.findall(_DIGITS.sub("0", text.lower()))
