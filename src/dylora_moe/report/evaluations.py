"""Files of a run's `eval/` folder -> what its page shows of them. They are told apart by their names.

`base`, `routed`, `dense` and `expert-NAME` are losses of who answered, with `test-` before them on test rows;
`matrix`, `similarity`, `compare`, `answers`, `code-NAME`, `levels-NAME` and `harness-NAME` are what they say.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dylora_moe.report.figures import by_domain, mean, number
from dylora_moe.report.records import Record, RunRecord

Evaluations = Mapping[str, Record]
_TEST, _EXPERT, _HARNESS = "test-", "expert-", "harness-"


def splits(evaluations: Evaluations, split: str) -> tuple[dict[str, Record], dict[str, Record]]:
    """Domain -> figures of the base, and of the trained model, on rows of a split other than validation."""
    return by_domain(evaluations.get(f"{split}-base")), by_domain(evaluations.get(f"{split}-routed"))


def expert_matrix(evaluations: Evaluations, split: str) -> Record | None:
    """Losses of each speaker on each domain, on rows of a split; None where they were not measured."""
    matrix = _matrix(evaluations, "" if split == "validation" else f"{split}-")
    if matrix is None:
        return None
    columns = []
    for place in range(len(matrix["domains"])):
        values = [value for row in matrix["rows"] if (value := number(row["losses"][place])) is not None]
        columns.append({"best": min(values, default=None), "worst": max(values, default=None)})
    oracles = [
        (f"oracle, an expert for each {name}", list(losses))
        for key, name in (("by_domain", "domain"), ("by_row", "row"))
        if isinstance(losses := (matrix.get("oracle") or {}).get(key), Sequence)
        and len(losses) == len(matrix["domains"])
    ]
    rows = [row | {"mean": mean(number(loss) for loss in row["losses"])} for row in matrix["rows"]]
    return {"split": split, "domains": matrix["domains"], "rows": rows, "columns": columns, "oracles": oracles}


def _matrix(evaluations: Evaluations, prefix: str) -> Record | None:
    """As it was measured at once, or put together from experts that were measured one by one."""
    if whole := evaluations.get(f"{prefix}matrix"):
        return whole
    of_split = {name.removeprefix(prefix): record for name, record in evaluations.items() if name.startswith(prefix)}
    names = [name for name in of_split if name.startswith(_EXPERT)]
    told = {name: by_domain(of_split[name]) for name in ("base", *names, "routed") if name in of_split}
    domains = list(dict.fromkeys(domain for found in told.values() for domain in found))
    if not names or not domains:
        return None
    rows = [
        {
            "speaker": f"expert {name.removeprefix(_EXPERT)}" if name.startswith(_EXPERT) else name,
            "losses": [found[domain]["loss"] if domain in found else None for domain in domains],
        }
        for name, found in told.items()
    ]
    return {"domains": domains, "rows": rows}


def task_records(evaluations: Evaluations) -> Record:
    """What was measured by answers: programs, labels, levels, public tasks."""
    return {
        "codes": [record for name, record in evaluations.items() if name.startswith("code-")],
        "answers": [
            record for name, record in sorted(evaluations.items()) if name.removeprefix(_TEST).startswith("answers")
        ],
        "levels": [record for name, record in evaluations.items() if name.startswith("levels-")],
        "harness": [
            {"speaker": name.removeprefix(_HARNESS), **record}
            for name, record in evaluations.items()
            if name.startswith(_HARNESS)
        ],
    }


def trained_routing(run: RunRecord) -> tuple[Record | None, str]:
    """Where the trained model sends what, and when that was; of a run that goes on, the latest there is."""
    measured = run.evaluations.get("routed") or run.result.get("after")
    if measured and isinstance(measured.get("routing"), Mapping):
        return _routed(measured["routing"]), "after training"
    lines = [line for line in run.routing if line.get("split") == "validation"]
    if not lines:
        return None, ""
    return _routed(lines[-1]), f"at step {lines[-1].get('step')}"


def _routed(routing: Mapping[str, Any]) -> Record | None:
    """Nothing where there is but one expert to go to."""
    whole = {"unsure": 0.0, "domain_unsure": [0.0] * len(routing["domains"]), **routing}
    return whole if len(routing["experts"]) > 1 else None


def top_tokens(routing: Mapping[str, Any] | None) -> dict[str, list[Record]]:
    """Expert -> the tokens that set it apart."""
    found: Any = (routing or {}).get("top_tokens")
    if not isinstance(found, Mapping):
        return {}
    return {
        str(expert): [
            {"text": each["token"], "count": each.get("count"), "share": each.get("share")} for each in tokens
        ]
        for expert, tokens in found.items()
    }
