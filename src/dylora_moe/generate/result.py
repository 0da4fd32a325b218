"""What came of a generation: rows to train on, a side for validation, and the figures that a data card has."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dylora_moe.data.example import Message
from dylora_moe.generate.questions import Question

Origin = Literal["authentic", "generated"]
Side = Literal["train", "validation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeRow:
    """A row of the data.

    Attributes:
        id: Of what was asked, and of whom.
        level: That was asked for; None for an authentic answer, which nobody asked for at a level.
        question: That it answers.
        source: The data set that the question came from, or the answer of a person.
        licence: SPDX identifier of its text, None where unknown.
        answer: Word for word as it came.
        origin: Who wrote it.
        level_found: That the answer has; None where it is too short to tell, or levels are not checked.
        level_judged: That a judge named; None where none was asked, or it named none.
        reasons: Why it did not pass; none where it did.
    """

    id: str
    level: str | None
    question: Question
    source: str
    licence: str | None
    answer: str
    origin: Origin
    level_found: str | None = None
    level_judged: str | None = None
    reasons: tuple[str, ...] = ()


def authentic_rows(questions: Iterable[Question]) -> list[MadeRow]:
    """What people answered, never rewritten."""
    return [
        MadeRow(
            id=_digest("authentic", *(turn.content for turn in question.messages), answer.text)[:16],
            level=None,
            question=question,
            source=answer.source,
            licence=answer.licence,
            answer=answer.text,
            origin="authentic",
        )
        for question in questions
        for answer in question.answers
    ]


def side_of(question: Question, *, validation_split: float, seed: int) -> Side:
    """Which side all rows of a question are on, by its words alone, whatever else there is."""
    digest = _digest(str(seed), *(" ".join(turn.content.lower().split()) for turn in question.messages))
    return "validation" if int(digest[:12], 16) < validation_split * 16**12 else "train"


def as_record(row: MadeRow, before: Sequence[Message], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a line of JSON: `messages`, and where it comes from.

    Args:
        row: The row.
        before: Messages that stand before the conversation.
        provenance: Of what was generated: model, prompts.
    """
    turns = [*before, *row.question.messages, Message(role="assistant", content=row.answer)]
    record: dict[str, Any] = {
        "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
        "id": row.id,
        "level": row.level,
        "level_found": row.level_found,
        "level_judged": row.level_judged,
        "origin": row.origin,
        "source": row.source,
        "licence": row.licence,
    }
    if row.origin == "generated":
        record |= provenance
    if row.reasons:
        record["reasons"] = list(row.reasons)
    return record


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "replace")).hexdigest()
