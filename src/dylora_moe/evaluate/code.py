"""How many problems a model solves: programs that it wrote, run in a sandbox against the problems' own tests.

A program passes when it runs through, its tests included, within the limits. A solution that only pretends to, because
it reads the tests beside it or knows what is looked for at the end, is not told from a right one. What the sandbox does
not keep in is said in `dylora_moe.sandbox`.
"""

import math
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylora_moe.data.example import Message
from dylora_moe.data.templates import end_token_id
from dylora_moe.errors import DataError, SandboxError
from dylora_moe.evaluate.generate import Sampling, generate_answers
from dylora_moe.evaluate.intervals import mean_interval, share_interval
from dylora_moe.evaluate.load import Speaker, TrainedRun, load_run
from dylora_moe.evaluate.paired import shares_against_base
from dylora_moe.evaluate.problems import Problem, Split, as_module, extract_code, read_problems
from dylora_moe.sandbox import Limits, Sandbox, find_sandbox

# Of the samples at k > 1, as in the HumanEval paper (arXiv 2107.03374, section 3.3); top p 0.95 as there.
TEMPERATURE, TOP_P = 0.8, 0.95
_MAX_TOKENS = 512  # the longest reference of MBPP's test split has 463 with Gemma's tokenizer
_LIMITS = Limits()

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one sample: `passed`, or why not, in a word of the sandbox's or `left early`."""

    ended: str
    program: str
    detail: str

    @property
    def passed(self) -> bool:
        """Whether it was right."""
        return self.ended == "passed"


def evaluate_code(
    folder: Path,
    problems_file: Path,
    speakers: Sequence[Speaker] = (Speaker(kind="base"), Speaker()),
    *,
    split: Split = "test",
    samples: int = 1,
    rows: int | None = None,
    sandbox: str = "auto",
    tell: Tell,
) -> dict[str, Any]:
    """Measure pass@k of a run and its base with the same prompts; the result goes to `eval/code-NAME-SPLIT.json`.

    One sample is the most likely answer; several are drawn at temperature 0.8, top p 0.95.

    Args:
        folder: Of the run.
        problems_file: As `read_problems` takes it.
        speakers: Who answers.
        split: Of the problems.
        samples: Answers a problem.
        rows: Problems, drawn with seed 0; None for all.
        sandbox: As `find_sandbox` takes it.
        tell: Takes a line for a person.

    Raises:
        SandboxError: There is no sandbox, or reference solutions do not pass in it.
        DataError: The file holds no such problems.
        RunError, TunerError: As `evaluate_run`.
    """
    problems = read_problems(problems_file, split)
    there = len(problems)
    if rows is not None and rows < there:
        problems = sorted(random.Random(0).sample(problems, rows), key=problems.index)
    box = find_sandbox(sandbox)
    trained = load_run(folder, progress=tell)
    check_references(problems, box, tell)
    measured, example, solved = [], None, dict[str, list[float]]()
    for speaker in speakers:
        verdicts, answers = _solve(trained, speaker, problems, samples, box, tell)
        passed = [sum(verdict.passed for verdict in each) for each in verdicts]
        solved[speaker.name] = [each / samples for each in passed]
        measured.append(_figures(speaker, problems, passed, samples, verdicts))
        example = {
            "problem": problems[0].name,
            "prompt": problems[0].prompt,
            "answer": answers[0],
            "program": verdicts[0][0].program,
            "verdict": verdicts[0][0].ended,
            "detail": verdicts[0][0].detail,
        }
    record = {
        "name": problems_file.name.partition(".")[0],
        "split": split,
        "sandbox": box.name,
        "problems": len(problems),
        "problems_there": there,
        "references_passed": len(problems),
        "samples": samples,
        "temperature": TEMPERATURE if samples > 1 else 0.0,
        "k": _ks(samples),
        "speakers": measured,
        "against_base": shares_against_base(solved),
        "example": example,
    }
    alone = f"-{speakers[0].name}" if len(speakers) == 1 else ""  # that it takes no place of what was measured together
    return trained.keep(f"code-{record['name']}-{split}{alone}", record)


def check_references(problems: Sequence[Problem], box: Sandbox, tell: Tell) -> None:
    """Run the solutions that the file itself has, by the way that answers take.

    Raises:
        SandboxError: One does not pass, so that a score on this machine would be too low.
    """
    tell(f"Checking {len(problems):,} reference solutions in {box.name} ...")
    verdicts = judge([(problem, problem.reference) for problem in problems], box)
    wrong = [(problem, verdict) for problem, verdict in zip(problems, verdicts, strict=True) if not verdict.passed]
    if wrong:
        problem, verdict = wrong[0]
        raise SandboxError(
            f"Reference solutions must pass before anything is scored, and {len(wrong)} of {len(problems)} do not, "
            f"such as {problem.name}: {verdict.ended}. {verdict.detail} See `dylora doctor sandbox`; take a reference "
            "that is wrong itself out of the file."
        )


def judge(answers: Sequence[tuple[Problem, str]], box: Sandbox, limits: Limits = _LIMITS) -> list[Verdict]:
    """Run each answer's code with the tests of its problem; as many at once as there are cores."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(lambda pair: _judge(pair[0], pair[1], box, limits), answers))


def _judge(problem: Problem, answer: str, box: Sandbox, limits: Limits) -> Verdict:
    program, mark = as_module(problem.program(extract_code(answer))), secrets.token_hex(8)
    # A program that ends itself with exit code 0 before its tests did does not say this.
    told = f"__import__('builtins').print({mark!r})"  # also where the program has a print of its own
    outcome = box.run(f"{program}\n{told}\n", limits)
    ended = outcome.ended
    if ended == "passed" and mark not in outcome.stdout:
        ended = "left early"
    return Verdict(ended=ended, program=program, detail=outcome.stderr.strip().rpartition("\n")[2][:300])


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that of k samples drawn from these one passes, at least.

    Source: the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, section 2.1).

    Raises:
        DataError: Not 1 <= k <= samples, or not 0 <= passed <= samples.
    """
    if not (1 <= k <= samples and 0 <= passed <= samples):
        raise DataError(f"pass@k needs 1 <= k <= samples and passed among them, got k={k}, {passed} of {samples}.")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def _ks(samples: int) -> list[int]:
    return [k for k in (1, 5, 10, 100) if k <= samples]


def _solve(
    trained: TrainedRun, speaker: Speaker, problems: Sequence[Problem], samples: int, box: Sandbox, tell: Tell
) -> tuple[list[list[Verdict]], list[str]]:
    """Verdicts of the samples of each problem, and the first answer to each."""
    tell(f"{speaker.name} answers {len(problems):,} problems, {samples} each ...")
    sampling = None if samples == 1 else Sampling(temperature=TEMPERATURE, top_p=TOP_P, seed=0)
    asked = [problem for problem in problems for _ in range(samples)]
    texts: list[str] = []
    size = trained.config.eval_batch_size
    with trained.speaking(speaker):
        for start in range(0, len(asked), size):
            answers = generate_answers(
                trained.model,
                trained.tokenizer,
                [[Message(role="user", content=problem.prompt)] for problem in asked[start : start + size]],
                max_new_tokens=_MAX_TOKENS,
                end_token_ids=[end_token_id(trained.tokenizer)],
                sampling=None if sampling is None else sampling.moved(start),
            )
            texts += [answer.text for answer in answers]
            tell(f"  {min(start + size, len(asked)):,} of {len(asked):,} answers")
    verdicts = judge(list(zip(asked, texts, strict=True)), box)
    return [verdicts[start : start + samples] for start in range(0, len(asked), samples)], texts[::samples]


def _figures(
    speaker: Speaker,
    problems: Sequence[Problem],
    passed: Sequence[int],
    samples: int,
    verdicts: Sequence[list[Verdict]],
) -> dict[str, Any]:
    shares = {k: [pass_at_k(samples, each, k) for each in passed] for k in _ks(samples)}
    return {
        "speaker": speaker.name,
        "pass": {str(k): sum(each) / len(each) for k, each in shares.items()},
        "interval": {
            str(k): share_interval(sum(passed), len(passed)) if samples == 1 else mean_interval(each)
            for k, each in shares.items()
        },
        "ended": dict(Counter(verdict.ended for each in verdicts for verdict in each)),
        "passed": {problem.name: number for problem, number in zip(problems, passed, strict=True)},
    }
