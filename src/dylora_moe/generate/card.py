"""The card of made data: what they are, where they come from, and what they are made of, beside the rows."""

from collections.abc import Mapping
from typing import Any

_UNKNOWN = "licence unknown"


def data_card(record: Mapping[str, Any]) -> str:
    """Markdown, as hubs show it of a data set.

    Args:
        record: The result of a generation.
    """
    rows, levels, total = record["rows"], record["levels"], max(1, record["total"])
    lines = [
        "# Data that a second model wrote",
        "",
        f"{rows['train']:,} conversations to train on and {rows['validation']:,} to validate on; "
        "all rows of a question are on one side. "
        f"Answers by {record['generator']}, asked with the prompts {record['prompts']['pack']} "
        f"({record['prompts']['version']}); questions, and authentic answers, of "
        f"{', '.join(f'{source} ({_named(licences)})' for source, licences in record['licences'].items())}. "
        "What a model wrote may also be bound by the terms of that model.",
        "",
        *_table(
            ("answers", "rows", "share"), [(name, count, count / total) for name, count in record["origins"].items()]
        ),
        "",
        *_table(
            ("level", "asked for", "passed", "share of the passed", "words an answer"),
            [
                (
                    name,
                    level["asked"],
                    level["passed"],
                    level["passed"] / max(1, rows["passed"]),
                    "" if level["words"] is None else f"{level['words']:.1f}",
                )
                for name, level in levels.items()
            ],
        ),
        "",
        *_table(
            ("answers", "different words", "different pairs of words", "self-BLEU"),
            [
                (name, *(f"{each[key]:.3f}" for key in ("distinct_1", "distinct_2", "self_bleu")))
                for name, each in record["variety"].items()
            ],
        ),
        "",
        "Each row has `messages`, `level` (asked for), `level_found`, `level_judged`, `origin` (authentic or "
        "generated), `source`, `licence`, and where a model wrote it `generator`, `prompts` and `seed`. "
        f"{rows['set_aside']:,} of {rows['planned']:,} rows did not pass; "
        + ("those with an answer are here, with their `reasons`." if record["keep"] == "all" else "none is here."),
    ]
    return "\n".join(lines) + "\n"


def _named(licences: list[str | None]) -> str:
    return ", ".join(licence or _UNKNOWN for licence in licences)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    def written(cell: Any) -> str:
        return f"{cell:,}" if isinstance(cell, int) else f"{cell:.1%}" if isinstance(cell, float) else str(cell)

    cells = [list(map(written, row)) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *cells)]
