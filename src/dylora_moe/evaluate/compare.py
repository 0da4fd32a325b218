"""Two runs on the same rows: which is better, by how much, and could it be chance?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dylora_moe.errors import DataError
from dylora_moe.evaluate.held_out import Split
from dylora_moe.evaluate.load import Speaker
from dylora_moe.evaluate.paired import compare_rows
from dylora_moe.evaluate.run import evaluate_run, is_measured, read_rows
from dylora_moe.run_dir import EVAL, RunDir


def compare_runs(folder: Path, others: Sequence[Path], *, split: Split, tell: Callable[[str], None]) -> dict[str, Any]:
    """Compare the mixture of a run with those of others on the rows that both have in a split.

    A run whose present model is not measured yet is measured first. The result goes to `eval/compare.json` of the
    first run, of the test split with `test-` before the name.

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
        compared.append({"run": str(path), "model": RunDir(path).model_digest(), "domains": domains})
    own = RunDir(folder)
    record = {"run": str(folder), "model": own.model_digest(), "split": split, "others": compared}
    own.write(f"{EVAL}/{'' if split == 'validation' else split + '-'}compare.json", record)
    return record
