"""pass@k against counting, verdicts of programs that really run, and a run that really answers."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.errors import DataError, SandboxError
from dylora_moe.evaluate import code
from dylora_moe.evaluate.code import check_references, evaluate_code, judge, pass_at_k
from dylora_moe.evaluate.problems import Problem, read_problems
from dylora_moe.run_dir import RunDir
from dylora_moe.sandbox import Limits, Sandbox, find_sandbox

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return find_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def mbpp(tmp_path: Path) -> Path:
    rows = [
        {
            "task_id": 11 + number,
            "text": f"Return {number}.",
            "code": f"def f():\n    return {number}",
            "test_list": [f"assert f() == {number}"],
        }
        for number in range(3)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 0), (8, 3)])
def test_pass_at_k_is_the_share_of_all_choices_with_one_that_passes(samples: int, passed: int) -> None:
    results = [place < passed for place in range(samples)]
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(results, k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("samples", "passed", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_of_what_cannot_be_is_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(DataError, match="pass@k needs"):
        pass_at_k(samples, passed, k)


def test_answers_get_the_verdict_that_they_deserve(box: Sandbox, mbpp: Path) -> None:
    problem = read_problems(mbpp, "test")[1]
    answers = {
        "def f():\n    return 1": "passed",
        "def f():\n    return 2": "failed",
        "def f(:": "failed",
        "import sys\nsys.exit(0)": "left early",
        "import os\nos._exit(0)": "left early",
        "def f():\n    return 1\n\nif __name__ == '__main__':\n    print(f(), input())": "passed",
        "print = None\ndef f():\n    return 1": "passed",
        "import atexit\natexit.register(print, 'goodbye')\ndef f():\n    return 1": "passed",
        "while True: pass": "cpu time",
        "x = bytearray(1 << 40)": "memory",
    }
    limits = Limits(cpu_seconds=2, memory_bytes=1 << 29)
    verdicts = judge([(problem, answer) for answer in answers], box, limits)
    assert dict(zip(answers, (verdict.ended for verdict in verdicts), strict=True)) == answers
    assert "AssertionError" in verdicts[1].detail and "SyntaxError" in verdicts[2].detail


def test_a_machine_on_which_references_fail_gives_no_score(box: Sandbox, mbpp: Path) -> None:
    problems = read_problems(mbpp, "test")
    check_references(problems, box, silent)
    wrong = Problem(name="mbpp/99", prompt="?", reference="def f(): return 7", program=problems[0].program)
    with pytest.raises(SandboxError, match=r"1 of 4 do not, such as mbpp/99: failed\. AssertionError"):
        check_references([*problems, wrong], box, silent)


def test_a_run_and_its_base_are_asked_the_same(
    box: Sandbox, mbpp: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = Path(shutil.copytree(finished_run, tmp_path / "run")), []
    generate = code.generate_answers

    def note(model: Any, tokenizer: Any, conversations: Any, **how: Any) -> Any:
        asked.append((model.state.disabled, [each[-1].content for each in conversations], how["sampling"]))
        return generate(model, tokenizer, conversations, **how)

    monkeypatch.setattr(code, "generate_answers", note)
    monkeypatch.setattr(code, "_MAX_TOKENS", 12)
    found = evaluate_code(run, mbpp, samples=5, rows=2, sandbox=box.name, tell=silent)
    prompts = {disabled: [text for off, texts, _ in asked if off == disabled for text in texts] for disabled in (0, 1)}
    assert prompts[False] == prompts[True] and len(prompts[True]) == 10 and len(set(prompts[True])) == 2
    seeds = [sampling.seed for off, _, sampling in asked if off]
    assert len(set(seeds)) == len(seeds), "batches draw differently"
    assert [each["speaker"] for each in found["speakers"]] == ["base", "routed"] and found["k"] == [1, 5]
    assert (found["problems"], found["problems_there"], found["sandbox"]) == (2, 3, box.name)
    for each in found["speakers"]:
        assert sum(each["ended"].values()) == 10 and each["pass"]["1"] == 0.0, "random models solve nothing"
    assert found["example"]["prompt"] in prompts[True]
    assert RunDir(run).read("eval/code-tasks-test.json") == json.loads(json.dumps(found))


def test_what_passes_is_counted(
    box: Sandbox, mbpp: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    generate = code.generate_answers

    def solve(model: Any, tokenizer: Any, conversations: Any, **how: Any) -> Any:
        """The mixture solves the first two of three; the base none."""
        answers = generate(model, tokenizer, conversations, **(how | {"max_new_tokens": 1}))
        number = 9 if model.state.disabled else 0
        texts = [f"def f(): return {int('Return 1' in each[-1].content) + number}" for each in conversations]
        return [replace(answer, text=text) for answer, text in zip(answers, texts, strict=True)]

    monkeypatch.setattr(code, "generate_answers", solve)
    found = evaluate_code(run, mbpp, sandbox=box.name, tell=silent)
    base, routed = found["speakers"]
    assert found["against_base"]["difference"] == pytest.approx(2 / 3) and found["against_base"]["rows"] == 3
    assert base["pass"] == {"1": 0.0} and base["ended"] == {"failed": 3}
    assert routed["pass"]["1"] == pytest.approx(2 / 3) and routed["ended"] == {"passed": 2, "failed": 1}
    assert routed["passed"] == {"mbpp/11": 1, "mbpp/12": 1, "mbpp/13": 0}
    low, high = routed["interval"]["1"]
    assert 0 <= low < 2 / 3 < high <= 1


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in shared/data")
def test_all_reference_solutions_of_mbpp_pass_here(box: Sandbox) -> None:
    problems = read_problems(SHARED / "mbpp" / "mbpp.jsonl", "test")
    assert len(problems) == 500
    verdicts = judge([(problem, problem.reference) for problem in problems], box)
    wrong = {problem.name: each for problem, each in zip(problems, verdicts, strict=True) if not each.passed}
    assert not wrong
