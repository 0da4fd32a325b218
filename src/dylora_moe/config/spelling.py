"""What a mistyped word was meant to be. Pure."""

from collections import Counter
from collections.abc import Collection

NUM_NAMED = 2
"""Names that are offered at most; more that are as near as each other say nothing."""

_SHORTEST_PART = 4  # letters; shorter parts are in too many names


def plain_name(name: str) -> str:
    """A name as settings are spelt: `--Learning-Rate` -> learning_rate."""
    return name.strip().lstrip("-").lower().replace("-", "_")


def nearest(name: str, known: Collection[str]) -> list[str]:
    """The known names fewest letters away from a mistyped one, if these are few; else those that it is part of.

    Args:
        name: Case, hyphens and those of a flag do not count.
        known: In plain spelling: lower case, underscores.

    Returns:
        Names as near as each other, those with the same first letter first.
    """
    name = plain_name(name)
    letters = Counter(name)
    # Letters that the other one lacks: each of them is an edit, so most words need no distance of their own.
    fewest = {word: max(len(name), len(word)) - (letters & Counter(word)).total() for word in known}
    best, near = max(1, len(name) // 3), list[str]()
    for word in sorted(known, key=fewest.__getitem__):
        if fewest[word] > best:
            break
        distance = edit_distance(name, word)
        if distance <= best:
            near = [*(near if distance == best else []), word]
            best = distance
    if not near and len(name) >= _SHORTEST_PART:
        near = [word for word in known if name in word]
    return sorted(near, key=lambda word: word[:1] != name[:1])


def edit_distance(one: str, other: str) -> int:
    """Fewest letters deleted, inserted, replaced or swapped with their neighbour to get from one text to the other.

    Source: optimal string alignment, the restricted form of Damerau 1964 (doi 10.1145/363958.363994).
    """
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if last and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def did_you_mean(near: list[str]) -> str:
    """A question that offers the first one or two of the names; empty for none."""
    return f"Did you mean {' or '.join(near[:NUM_NAMED])}?" if near else ""
