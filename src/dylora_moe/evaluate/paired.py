"""The same rows by two models: which is better on each domain, by how much, and could it be chance? Pure numbers."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dylora_moe.evaluate.intervals import holm, paired_difference

Row = Mapping[str, Any]


def compare_rows(ours: Sequence[Row], theirs: Sequence[Row]) -> list[dict[str, Any]]:
    """Domain by domain, the rows that both have.

    Returns:
        Of each domain `domain`, `unit` (nats a token; bits a byte where the two count tokens differently), `ours`,
        `theirs`, and a `Difference`, ours less theirs: below 0 ours is better. `p_holm` is its p, made larger for as
        many domains as are compared; `rows_apart` are those that one of the two has alone.
    """
    others = {(row["domain"], row["row"]): row for row in theirs}
    theirs_there = Counter(row["domain"] for row in theirs)
    found = []
    for domain in dict.fromkeys(row["domain"] for row in ours):
        of_domain = [row for row in ours if row["domain"] == domain]
        pairs = [(row, others[domain, row["row"]]) for row in of_domain if (domain, row["row"]) in others]
        if not pairs:
            continue
        by_tokens = all(one["tokens"] == other["tokens"] for one, other in pairs)
        size, scale = ("tokens", 1.0) if by_tokens else ("bytes", math.log(2))
        one, other, sizes = ([], [], [])
        for mine, yours in pairs:
            one.append(mine["nll"] / scale)
            other.append(yours["nll"] / scale)
            sizes.append(mine[size])
        found.append(
            {
                "domain": domain,
                "rows_apart": len(of_domain) + theirs_there[domain] - 2 * len(pairs),
                "unit": "nats a token" if by_tokens else "bits a byte",
                "ours": math.fsum(one) / sum(sizes),
                "theirs": math.fsum(other) / sum(sizes),
                **asdict(paired_difference(one, other, sizes)),
            }
        )
    adjusted = holm({each["domain"]: each["p"] for each in found})
    return [each | {"p_holm": adjusted[each["domain"]]} for each in found]


def shares_against_base(figures: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """The mixture's share less the base's on the same rows: above 0 the mixture is better.

    Args:
        figures: Speaker's name -> of each row, 1 for right and 0 for wrong, or the share of its samples that are right.

    Returns:
        A `Difference`; None unless both were measured.
    """
    if not {"base", "routed"} <= set(figures):
        return None
    ours, theirs = figures["routed"], figures["base"]
    return asdict(paired_difference(ours, theirs, [1.0] * len(ours)))
