"""How many rows of which level ask which question. Pure: the same questions and seed give the same plan."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dylora_moe.data.mixing import quotas
from dylora_moe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A row to make: the place of its question, and the level that it is to be answered at."""

    question: int
    level: str


def share_out(parts: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to the parts, not all of them 0, that add up to the total."""
    return dict(zip(parts, quotas(list(parts.values()), total), strict=True))


def make_plan(sources: Sequence[str], levels: Mapping[str, int], *, seed: int) -> list[Planned]:
    """Rows of every level, questions of each source in proportion to how many it has, drawn anew for each level.

    A question is asked at another level only when all of its source were asked, and never twice at one.

    Args:
        sources: Of each question, the name of where it comes from.
        levels: How many rows of each.
        seed: Decides which questions.

    Raises:
        ConfigError: A level has more rows than there are questions.
    """
    for level, rows in levels.items():
        if rows > len(sources):
            raise ConfigError(
                f"a level can have at most a row for each of the {len(sources)} questions, got {rows} of {level}. "
                "Lower total, or give more questions."
            )
    draw = random.Random(seed)
    places: dict[str, list[int]] = {}
    for place, source in enumerate(sources):
        places.setdefault(source, []).append(place)
    for found in places.values():
        draw.shuffle(found)
    sizes = {source: len(found) for source, found in places.items()}
    begun = dict.fromkeys(places, 0)
    plan = []
    for level, rows in levels.items():
        for source, number in share_out(sizes, rows).items():
            found = places[source]
            plan += [
                Planned(question=found[(begun[source] + offset) % len(found)], level=level) for offset in range(number)
            ]
            begun[source] += number
    return plan
