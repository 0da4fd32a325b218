"""Two runs on the same rows: which is better, by how much, and could it be chance?"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dylora_moe.errors import DataError
from dylora_moe.evaluate.held_out import Split
from dylora_moe.evaluate.intervals import holm, paired_difference
from dylora_moe.evaluate.load import Speaker
from dylora_moe.evaluate.run import evaluate_run, is_measured, read_rows
from dylora_moe.run_dir import EVAL, RunDir

Row = Mapping[str, Any]


def compare_runs(folder: Path, others: Sequence[Path], *, split: Split, tell: Callable[[str], None]) -> dict[str, Any]:
    """Compare the mixture of a run with those of others on the rows that both have in a split.

    A run whose present model is not measured yet is measured first. The result goes to `eval/compare.json` of the
    first run.

    Returns:
        `run`, `split`, and `others`: each with its `run` and its `domains`, as of `compare_rows`.

    Raises:
        As `evaluate_run`; DataError also where two runs have no row in common.
    """
    for path in (folder, *others):
        if not is_measured(RunDir(path), Speaker(), split):
            tell(f"Measuring {path} ...")
            evaluate_run(path, [Speaker()], split=split, tell=tell)
    rows = read_rows(RunDir(folder), Speaker(), split)
    compared = []
    for path in others:
        domains = compare_rows(rows, read_rows(RunDir(path), Speaker(), split))
        if not domains:
            raise DataError(
                f"runs are compared on the rows that both hold out for {split}, and {folder} and {path} have none in "
                "common. Train both on the same data, with the same seed, validation_split, learn, max_length and "
                "overlong, so that the same text is foretold."
            )
        compared.append({"run": str(path), "domains": domains})
    record = {"run": str(folder), "split": split, "others": compared}
    RunDir(folder).write(f"{EVAL}/compare.json", record)
    return record


def compare_rows(ours: Sequence[Row], theirs: Sequence[Row]) -> list[dict[str, Any]]:
    """Domain by domain, the rows that both have.

    Returns:
        Of each domain `domain`, `unit` (nats a token; bits a byte where the two count tokens differently), `ours`,
        `theirs`, and a `Difference`, ours less theirs: below 0 ours is better. `p_holm` is its p, made larger for as
        many domains as are compared.
    """
    others = {(row["domain"], row["row"]): row for row in theirs}
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
                "unit": "nats a token" if by_tokens else "bits a byte",
                "ours": math.fsum(one) / sum(sizes),
                "theirs": math.fsum(other) / sum(sizes),
                **asdict(paired_difference(one, other, sizes)),
            }
        )
    adjusted = holm({each["domain"]: each["p"] for each in found})
    return [each | {"p_holm": adjusted[each["domain"]]} for each in found]
