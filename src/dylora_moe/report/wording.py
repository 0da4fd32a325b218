"""How records are put, on screen and on a page alike."""

from collections.abc import Mapping, Sequence
from typing import Any

_COUNTS = {
    "num_filtered": "by the entry's filter",
    "num_test": "official test split",
    "num_unused": "splits of no use here",
    "num_not_drawn": "not drawn",
    "num_overlong": "too long",
    "num_bad_rows": "unreadable",
}
_REMOVED = {
    "encoding": "wrongly decoded",
    "empty": "empty answer",
    "truncated": "cut answer",
    "duplicate": "duplicate",
    "near_duplicate": "near duplicate",
    "leak": "prompt that is validated or tested on",
}


def left_out(domain: Mapping[str, Any]) -> dict[str, int]:
    """Why rows were left out -> how many, without zeros.

    Args:
        domain: A domain of a data summary, as JSON has it.
    """
    found = {text: domain[name] for name, text in _COUNTS.items()}
    found |= {text: domain["removed"].get(reason, 0) for reason, text in _REMOVED.items()}
    return {text: number for text, number in found.items() if number}


def visible(text: str) -> str:
    """A token's text with its line ends marked."""
    return text.replace("\r", "\u2190").replace("\n", "\u21b5\n")


def duration(seconds: float) -> str:
    """Seconds for a person to read."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def some(number: int, what: str) -> str:
    """A number of things: 1 expert, 1,200 rows."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names as a sentence has them; of many the first ones, and how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
