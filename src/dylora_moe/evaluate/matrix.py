"""Every expert on every domain: how far they specialise, and what the best choice among them would give."""

from collections.abc import Mapping, Sequence
from typing import Any

from dylora_moe.tuner import DyLoraModel
from dylora_moe.tuner.merge import similarity


def expert_matrix(
    measured: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Losses of each speaker on each domain, in nats a labelled token, and those of an oracle.

    The oracle knows the losses: `by_domain` takes the expert that is best on the domain, `by_row` the one that is best
    on the row. No router can be better than `by_row` that sends each document to one expert, and none to the base.

    Args:
        measured: Speaker -> its record.
        rows: Expert's speaker -> the record of every row, the same rows in the same order.
    """
    domains = [each["domain"] for each in next(iter(measured.values()))["domains"]]
    losses = {name: [each["loss"] for each in record["domains"]] for name, record in measured.items()}
    by_row = []
    for domain in domains:
        of_domain = [[row for row in lines if row["domain"] == domain] for lines in rows.values()]
        best = sum(min(same["nll"] for same in each) for each in zip(*of_domain, strict=True))
        by_row.append(best / max(sum(row["tokens"] for row in of_domain[0]), 1))
    return {
        "domains": domains,
        "rows": [{"speaker": name.replace("expert-", "expert ", 1), "losses": each} for name, each in losses.items()],
        "oracle": {
            "by_row": by_row,
            "by_domain": [min(losses[name][place] for name in rows) for place in range(len(domains))],
        },
    }


def similarities(model: DyLoraModel) -> dict[str, Any]:
    """Cosine of every two experts' changes of the base, -1 to 1."""
    names = model.expert_names
    pairs = {frozenset((one, other)) for one in names for other in names}
    found = {pair: similarity(model, min(pair), max(pair)) for pair in pairs}
    table = [[found[frozenset((one, other))] for other in names] for one in names]
    return {"experts": list(names), "similarity": table}
