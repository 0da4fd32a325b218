"""What readers hand out: a row with its place, and a row that cannot be used with the reason."""

from collections.abc import Callable
from dataclasses import dataclass

from dylora_moe.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        where: File and line or row.
        reason: What must hold, what was got and what to do.
        row: The row as read: its columns, or the line where that is no row at all.
    """

    where: str
    reason: str
    row: object


# A place such as `rows.jsonl, line 7`, and what stands there.
PlacedRow = tuple[str, object]
OnBad = Callable[[BadRow], None]


def stop_at(bad: BadRow) -> None:
    """What to do about a bad row where nothing else is asked for: stop.

    Raises:
        DataError: Always.
    """
    raise DataError(f"{bad.where}: {bad.reason}")
