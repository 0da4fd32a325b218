"""What every format needs: fields that must hold text, and the turns of a conversation."""

import difflib
from collections.abc import Iterable, Mapping

from dylora_moe.data.example import Message
from dylora_moe.errors import DataError

Row = Mapping[str, object]
Conversation = tuple[Message, ...]


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing where no known name is close."""
    # 0.5 and not difflib's 0.6: a swapped letter in a name as short as `mbpp` must be found.
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def text_field(row: Row, field: str, where: str, *, meaning: str) -> str:
    """The text of a field that must hold some.

    Raises:
        DataError: It is missing, no text or blank.
    """
    if field not in row:
        raise DataError(
            f"{where}: field {field!r} ({meaning}) is missing; the row has {', '.join(map(str, row))}. "
            "Add it or drop the row."
        )
    value = row[field]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(
            f"{where}: field {field!r} ({meaning}) must be text, got {kind} {str(value)[:60]!r}. "
            "Write it as a string or drop the row."
        )
    if not value.strip():
        raise DataError(f"{where}: field {field!r} ({meaning}) must hold text, got {value!r}. Drop the row.")
    return value


def first_field(row: Row, *fields: str) -> str:
    """The first of several names of a field that the row has; without any, the first name, for the error."""
    return next((field for field in fields if field in row), fields[0])


def list_field(row: Row, field: str, where: str, *, of: str) -> list[object]:
    """The items of a field that must be a list.

    Raises:
        DataError: It is missing or no list.
    """
    value = row.get(field)
    # Parquet readers give other sequences than lists; text would be split into letters.
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise DataError(f"{where}: field {field!r} must be a list of {of}, got {type(value).__name__}.")
    return list(value)


def turns(prompt: str, answer: str) -> Conversation:
    """A question and its answer."""
    return Message(role="user", content=prompt), Message(role="assistant", content=answer)
