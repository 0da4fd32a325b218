"""What a generation came to, in numbers and samples: the record that its page and its data card show."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dylora_moe.config import GenerateConfig
from dylora_moe.generate.levels import agreement, confusion
from dylora_moe.generate.packs import Pack
from dylora_moe.generate.prepare import Prepared
from dylora_moe.generate.result import MadeRow
from dylora_moe.generate.rows import RowState
from dylora_moe.generate.skeletons import Skeleton, find_skeletons, most_common
from dylora_moe.generate.variety import distinct, self_bleu

_PATTERNS, _SAMPLES = 10, 3  # of each shown


def figures(
    config: GenerateConfig,
    made: Prepared,
    states: Mapping[str, RowState],
    events: Sequence[Mapping[str, Any]],
    rows: Sequence[MadeRow],
    sides: Mapping[str, int],
) -> dict[str, Any]:
    """The result record.

    Args:
        config: The recipe.
        made: What it comes to.
        states: Of all rows, by id.
        events: The whole log.
        rows: That the data hold, authentic ones included.
        sides: How many rows there are to train and to validate on.
    """
    ended = Counter(state.end for state in states.values())
    asked = Counter(work.planned.level for work in made.work)
    passed = Counter(work.planned.level for work in made.work if states[work.id].end == "passed")
    generated = [row for row in rows if row.origin == "generated"]
    answers = {origin: [row.answer for row in rows if row.origin == origin] for origin in ("generated", "authentic")}
    words = {level: [len(row.answer.split()) for row in generated if row.level == level] for level in asked}
    authentic = len(rows) - len(generated)
    tokens_in, tokens_out = _sum(events, "tokens_in"), _sum(events, "tokens_out")
    return {
        "run": str(config.run_dir),
        "generator": config.generator,
        "prompts": {"pack": made.pack.name, "version": made.pack.version},
        "questions": asdict(made.counts) | {"kept": len(made.questions)},
        "rows": {
            "planned": len(made.work),
            "passed": ended["passed"],
            "set_aside": ended["set_aside"],
            "authentic": authentic,
            **sides,
        },
        "total": len(rows),
        "origins": {
            "authentic": authentic,
            "generated": len(generated),
            "cut from a pattern": sum("template" in row.reasons for row in generated),
        },
        "levels": {
            level: {
                "asked": asked[level],
                "passed": passed[level],
                "words": sum(words[level]) / len(words[level]) if words[level] else None,
            }
            for level in asked
        },
        "levels_found": levels_against(made.pack, [(row.level, row.level_found) for row in generated]),
        "patterns": [asdict(each) for each in _patterns(made, events)],
        "licences": {source: sorted(found, key=str) for source, found in _licences(rows).items()},
        "keep": config.keep,
        "samples": _samples(rows),
        "set_aside": dict(
            Counter(
                reason
                for state in states.values()
                if state.end == "set_aside"
                for reason in (state.failure or state.reasons)
            )
        ),
        "refused_answers": dict(
            Counter(reason for event in events if event["kind"] in ("answer", "review") for reason in event["reasons"])
        ),
        "failures": dict(Counter(event["reasons"][0] for event in events if event["kind"] == "failure")),
        "requests": sum(event["kind"] in ("answer", "failure", "probe") for event in events),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "cost": price(config, tokens_in, tokens_out),
        "variety": {
            origin: {"distinct_1": distinct(found, 1), "distinct_2": distinct(found, 2), "self_bleu": self_bleu(found)}
            for origin, found in answers.items()
            if found
        },
    }


def _licences(rows: Sequence[MadeRow]) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for row in rows:
        found.setdefault(row.source, set()).add(row.licence)
    return found


def price(config: GenerateConfig, tokens_in: int, tokens_out: int) -> float:
    """Of tokens that were read and written, in the currency of the recipe's prices."""
    return (tokens_in * config.input_price + tokens_out * config.output_price) / 1e6


def _sum(events: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(event.get(name) or 0 for event in events)


def levels_against(pack: Pack, pairs: Sequence[tuple[str | None, str | None]]) -> dict[str, Any] | None:
    """Levels asked for against those told of the answers: counts, rows being asked for; None where none was told."""
    told = [(asked, other) for asked, other in pairs if asked is not None and other is not None]
    if not told:
        return None
    names = list(pack.levels)
    counts = confusion(names, [asked for asked, _ in told], [other for _, other in told])
    return {"levels": names, "counts": counts, "kappa": agreement(counts), "rows": len(told)}


def _patterns(made: Prepared, events: Sequence[Mapping[str, Any]]) -> list[Skeleton]:
    """What the first answers of all rows were cut from."""
    first: dict[str, str] = {}
    for event in events:
        if event["kind"] == "answer":
            first.setdefault(event["id"], event["text"])
    work = [each for each in made.work if each.id in first]
    asked = [" ".join(turn.content for turn in each.question.messages) for each in work]
    return most_common(find_skeletons(asked, [first[each.id] for each in work]), _PATTERNS)


def _samples(rows: Sequence[MadeRow]) -> list[dict[str, Any]]:
    """A few rows of each level and origin, in the order of their ids, which is as good as drawn."""
    taken: Counter[tuple[str | None, str]] = Counter()
    found = []
    for row in sorted(rows, key=lambda each: (each.level or "", each.id)):
        taken[row.level, row.origin] += 1
        if taken[row.level, row.origin] <= _SAMPLES:
            turns = row.question.messages
            asked = (
                row.question.text if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.content}" for turn in turns)
            )
            record = {"level": row.level, "origin": row.origin, "question": asked, "answer": row.answer}
            found.append(record | {"reasons": list(row.reasons)})
    return found
