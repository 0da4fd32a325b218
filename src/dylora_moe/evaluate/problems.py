"""Files of MBPP and HumanEval -> problems: what a model is asked, and the program that tells whether it was right."""

import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dylora_moe.data.formats.pairs import read_mbpp
from dylora_moe.data.readers import read_rows
from dylora_moe.data.registry import REGISTRY
from dylora_moe.errors import DataError

Split = Literal["validation", "test"]

# A fence on a line of its own, its language, and what stands before the next fence of that kind or the end.
_FENCED = re.compile(
    r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
_PYTHON = ("python", "python3", "py", "py3")
# Where code begins in an answer without a fence: the first line that only Python has.
_CODE_LINE = re.compile(r"^(?:(?:async )?def |class |import |from \w|@|[A-Za-z_]\w*[ \t]*=[^=])", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)


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
    readers = [_reader_of(row, where) for where, row in rows]
    problems = [
        problem
        for (where, row), read in zip(rows, readers, strict=True)
        if (problem := read(row, where, split)) is not None
    ]
    if not problems:
        raise DataError(f"{path} must hold problems of the {split} split, and has none among {len(rows):,} rows.")
    return problems


def _reader_of(row: Mapping[str, Any], where: str) -> Callable[[Mapping[str, Any], str, Split], Problem | None]:
    if {"code", "test_list", "task_id"} <= set(row):
        return _mbpp
    if {"prompt", "test", "entry_point", "canonical_solution"} <= set(row):
        return _human_eval
    raise DataError(
        f"{where}: a problem must have the columns of MBPP (text or prompt, code, test_list, task_id) or of HumanEval "
        f"(prompt, test, entry_point, canonical_solution), got {', '.join(sorted(row))}."
    )


def _mbpp(row: Mapping[str, Any], where: str, split: Split) -> Problem | None:
    """The prompt is the one that MBPP's rows are trained on with."""
    number = row["task_id"]
    if not isinstance(number, int) or not isinstance(row["test_list"], list):
        raise DataError(
            f"{where}: a task of MBPP must have a whole number as task_id and a list of lines as test_list, got "
            f"{str(number)[:40]!r} and {type(row['test_list']).__name__}."
        )
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
    heads = list(re.finditer(rf"^(?:@[^\n]*\n)*def {re.escape(entry)}\b", start, re.MULTILINE))
    if not heads:
        raise DataError(f"{where}: the prompt must hold the head of the function {entry!r}, and has none.")
    before = start[: heads[-1].start()]  # imports and helpers, which an answer may leave out

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
    """The code of an answer.

    Its first fenced block of Python, else its first without a language; else from the first line that is Python,
    unless the answer begins indented, as the rest of a function does; else all of it.
    """
    blocks = [(language.lower(), textwrap.dedent(code).rstrip()) for _, language, code in _FENCED.findall(answer)]
    for wanted in (_PYTHON, ("",)):
        if found := [code for language, code in blocks if language in wanted]:
            return found[0]
    if not answer.startswith((" ", "\t")) and (first := _CODE_LINE.search(answer)):
        return answer[first.start() :].rstrip()
    return answer.rstrip()


def as_module(program: str) -> str:
    """The same program, for which `if __name__ == "__main__":` does not hold, as in the benchmarks' own harnesses."""
    future = "".join(line.rstrip("\n") + "\n" for line in _FUTURE.findall(program))
    return f"{future}__name__ = 'program'\n{_FUTURE.sub('', program)}"
