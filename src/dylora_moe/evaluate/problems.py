"""Files of MBPP and HumanEval -> problems: what a model is asked, and the program that tells whether it was right."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dylora_moe.data.formats.pairs import read_mbpp
from dylora_moe.data.readers import read_rows
from dylora_moe.data.registry import REGISTRY
from dylora_moe.errors import DataError

Split = Literal["validation", "test"]

_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# Where code begins in an answer without a fence: the first line that only Python has.
_CODE_LINE = re.compile(r"^(?:def |class |import |from \w|@|[A-Za-z_]\w*[ \t]*=[^=])", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A task whose answer is a program.

    Attributes:
        name: In its file.
        prompt: What the model is asked, as a user's turn.
        reference: The solution in the file, as an answer would hold it.
        program: Code of a solution -> that and its tests, which raise where it is wrong.
    """

    name: str
    prompt: str
    reference: str
    program: Callable[[str], str]


def read_problems(path: Path, split: Split) -> list[Problem]:
    """The problems of a file, told apart by their columns.

    MBPP is divided by its authors' numbers (test 11 to 510, validation 511 to 600); all of HumanEval is a test.

    Raises:
        DataError: The file is of neither form, or has no problem of that split.
    """
    rows = list(read_rows(path))
    read = _reader_of(rows[0][1], path)
    problems = [problem for where, row in rows if (problem := read(row, where, split)) is not None]
    if not problems:
        raise DataError(f"{path} must hold problems of the {split} split, and has none among {len(rows):,} rows.")
    return problems


def _reader_of(row: Mapping[str, Any], path: Path) -> Callable[[Mapping[str, Any], str, Split], Problem | None]:
    if {"code", "test_list", "task_id"} <= set(row):
        return _mbpp
    if {"prompt", "test", "entry_point", "canonical_solution"} <= set(row):
        return _human_eval
    raise DataError(
        f"{path} must have the columns of MBPP (text or prompt, code, test_list, task_id) or of HumanEval (prompt, "
        f"test, entry_point, canonical_solution), got {', '.join(sorted(row))}."
    )


def _mbpp(row: Mapping[str, Any], where: str, split: Split) -> Problem | None:
    """The prompt is the one that MBPP's rows are trained on with."""
    number = int(row["task_id"])
    if not any(each.split == split and each.first <= number <= each.last for each in REGISTRY["mbpp"].id_splits):
        return None
    (turns,) = read_mbpp(row, where)
    setup = [str(row.get("test_setup_code") or ""), *map(str, row.get("test_imports") or ())]
    tests = "\n".join([*setup, *map(str, row["test_list"])])
    return Problem(
        name=f"mbpp/{number}",
        prompt=turns[0].content,
        reference=turns[-1].content,
        program=lambda code: f"{code}\n\n{tests}\n",
    )


def _human_eval(row: Mapping[str, Any], where: str, split: Split) -> Problem | None:
    if split != "test":
        return None
    start, entry, test = str(row["prompt"]), str(row["entry_point"]), str(row["test"])
    before = start[: start.rfind(f"def {entry}")]  # imports and helpers, which an answer may leave out

    def program(code: str) -> str:
        whole = f"{before}\n{code}" if re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE) else start + code
        return f"{whole}\n\n{test}\n\ncheck({entry})\n"

    return Problem(
        name=str(row.get("task_id", where)),
        prompt=f"Complete this Python function. Answer with the whole function.\n\n```python\n{start.rstrip()}\n```",
        reference=f"```python\n{start}{row['canonical_solution']}\n```",
        program=program,
    )


def extract_code(answer: str) -> str:
    """The code of an answer: its first fenced block; else from the first line that is Python; else all of it."""
    if fenced := _FENCED.search(answer):
        return fenced.group(1).rstrip()
    if first := _CODE_LINE.search(answer):
        return answer[first.start() :].rstrip()
    return answer.rstrip()
