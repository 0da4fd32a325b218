"""Problems as their files have them, and code as answers have it."""

import json
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.errors import DataError
from dylora_moe.evaluate.problems import as_module, extract_code, read_problems

MBPP = {"text": "Add.", "code": "def add(a, b):\r\n    return a + b", "test_list": ["assert add(1, 2) == 3"]}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from math import pi\n\n\ndef area(r):\n    """Of a circle."""\n',
    "canonical_solution": "    return pi * r * r\n",
    "test": "def check(candidate):\n    assert 3.1 < candidate(1) < 3.2\n",
    "entry_point": "area",
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def runs(program: str) -> bool:
    try:
        exec(program, {})
    except Exception:
        return False
    return True


def test_mbpp_is_divided_as_its_authors_did(tmp_path: Path) -> None:
    rows = [MBPP | {"task_id": number} for number in (10, 11, 510, 511, 600, 601)]
    path = write(tmp_path / "mbpp.jsonl", rows)
    assert [each.name for each in read_problems(path, "test")] == ["mbpp/11", "mbpp/510"]
    assert [each.name for each in read_problems(path, "validation")] == ["mbpp/511", "mbpp/600"]


def test_mbpp_is_asked_as_its_rows_are_trained_on(tmp_path: Path) -> None:
    (problem,) = read_problems(write(tmp_path / "mbpp.jsonl", [MBPP | {"task_id": 11}]), "test")
    assert problem.prompt == "Add. Your code should pass these tests:\n\nassert add(1, 2) == 3"
    assert runs(problem.program(extract_code(problem.reference)))
    assert not runs(problem.program("def add(a, b):\n    return a - b"))


def test_what_a_problem_needs_beforehand_is_run_before_its_tests(tmp_path: Path) -> None:
    more = {"task_id": 12, "test_setup_code": "ONE = 1", "test_imports": ["import math"]}
    row = MBPP | more | {"test_list": ["assert add(ONE, math.floor(2.5)) == 3"]}
    (problem,) = read_problems(write(tmp_path / "mbpp.jsonl", [row]), "test")
    assert runs(problem.program("def add(a, b): return a + b"))


def test_human_eval_takes_a_whole_function_or_the_rest_of_one(tmp_path: Path) -> None:
    path = write(tmp_path / "HumanEval.jsonl", [HUMAN_EVAL])
    (problem,) = read_problems(path, "test")
    assert HUMAN_EVAL["prompt"].strip() in problem.prompt
    assert runs(problem.program(extract_code(problem.reference)))
    assert runs(problem.program("def area(r):\n    return pi * r**2")), "imports of the prompt are there"
    assert runs(problem.program("    return pi * r**2"))
    assert not runs(problem.program("    return r**2"))
    with pytest.raises(DataError, match="has none among 1 rows"):
        read_problems(path, "validation")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```python\ndef f():\n    pass\n```", "def f():\n    pass"),
        ("Here it is:\n```py\nx = 1\n```\nIt sets x.\n```\ny\n```", "x = 1"),
        ("``` \nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n", "x = 1"),  # cut off
        ("```bash\npip install x\n```\nThen\n```python\ny = 2\n```", "y = 2"),
        ("```\n7\n```\nis what this prints:\n```python3 title=a\nprint(7)\n```", "print(7)"),
        ("~~~python\nx = 1\n~~~\nIt is so.", "x = 1"),
        ("1. Do this:\n   ```python\n   x = 1\n   if x:\n       y = 2\n   ```", "x = 1\nif x:\n    y = 2"),
        ("```python\ns = 'a ``` b'\nx = 1\n```", "s = 'a ``` b'\nx = 1"),
        ("    return 1\n\nimport os\n", "    return 1\n\nimport os"),
        ("Sure! This adds.\n\ndef f(a):\n    return a", "def f(a):\n    return a"),
        ("import re\nx = 1\n", "import re\nx = 1"),
        ("    return a + b", "    return a + b"),
        ("I do not know", "I do not know"),
        ("", ""),
    ],
)
def test_code_is_found_in_an_answer(answer: str, code: str) -> None:
    assert extract_code(answer) == code


def test_a_program_is_no_script_and_keeps_its_future() -> None:
    assert runs(as_module("if __name__ == '__main__':\n    raise SystemError\n"))
    assert not runs(as_module("if __name__ == 'program':\n    raise ValueError\n"))
    assert runs(as_module("x = 1\nfrom __future__ import annotations\ndef f(a: Nothing): ...\n"))


def test_the_function_asked_for_is_told_from_others_of_like_names(tmp_path: Path) -> None:
    other = "import math\n\ndef area_of(r):\n    return math.pi * r\n\n\n"
    start = other + '@staticmethod\ndef area(r):\n    """Not def area."""\n'
    row = HUMAN_EVAL | {"prompt": start, "canonical_solution": "    return area_of(r) * r\n"}
    (problem,) = read_problems(write(tmp_path / "HumanEval.jsonl", [row]), "test")
    assert runs(problem.program(extract_code(problem.reference)))
    assert runs(problem.program("def area(r):\n    return area_of(r) * r"))
    path = write(tmp_path / "bad.jsonl", [HUMAN_EVAL | {"prompt": "def other(): ...\n"}])
    with pytest.raises(DataError, match="must hold the head of the function 'area'"):
        read_problems(path, "test")


@pytest.mark.parametrize("change", [{"task_id": "x"}, {"task_id": 11, "test_list": None}], ids=str)
def test_rows_of_the_wrong_form_are_told(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path / "mbpp.jsonl", [MBPP | {"task_id": 12}, MBPP | change])
    with pytest.raises(DataError, match=r"mbpp\.jsonl.* 2.*: a task of MBPP must have"):
        read_problems(path, "test")
    path = write(tmp_path / "mixed.jsonl", [MBPP | {"task_id": 12}, {"task_id": 13}])
    with pytest.raises(DataError, match="must have the columns of MBPP"):
        read_problems(path, "test")


def test_other_files_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "?", "answer": "!"}])
    with pytest.raises(DataError, match=r"must have the columns of MBPP .* got answer, question"):
        read_problems(path, "test")
    with pytest.raises(DataError):
        read_problems(tmp_path / "missing.jsonl", "test")
