"""A second opinion on levels: another model is asked for the level of every answer that passed."""

import hashlib
import re
from collections.abc import Mapping, Sequence

from dylora_moe.generate.asking import Models
from dylora_moe.generate.clients import Reply, Request
from dylora_moe.generate.engine import Job
from dylora_moe.generate.journal import Journal
from dylora_moe.generate.packs import Pack
from dylora_moe.generate.prepare import Work
from dylora_moe.generate.rows import Limits

UNCLEAR = "no level"
_MAX_TOKENS, _AGAIN = 16, 2  # of a reply; replies after one that names no level


def judge_job(pack: Pack, work: Work, answer: str) -> Job:
    """What the judge is asked of an answer. Its id has the answer, so that a new one is judged anew."""
    messages = pack.judge(work.question.messages, answer)
    names = list(pack.levels)

    def ask(reasons: Sequence[str], answers: int) -> Request:
        warmer = 0.0 if answers == 0 else 0.7  # the same question again gets the same reply
        return Request(messages=messages, max_tokens=_MAX_TOKENS, temperature=warmer, top_p=1.0, seed=answers)

    def check(reply: Reply) -> list[str]:
        return [] if named_level(reply.text, names) is not None else [UNCLEAR]

    return Job(id=_identify(work, answer), ask=ask, check=check)


def named_level(text: str, levels: Sequence[str]) -> str | None:
    """The only level that a reply names; None where it names none or several."""
    named = {level for level in levels if re.search(rf"(?<!\w){re.escape(level)}(?!\w)", text, re.IGNORECASE)}
    return named.pop() if len(named) == 1 else None


def judge_levels(
    judge: str, models: Models, pack: Pack, answers: Mapping[str, tuple[Work, str]], opinions: Journal
) -> dict[str, str | None]:
    """Id of a row -> the level that the judge names; None where it names none, or does not answer.

    Args:
        judge: The model that is asked.
        models: Asks it.
        pack: Has the levels, and says how it is asked.
        answers: Id of a row -> what was planned, and its answer.
        opinions: The log; what is in it is not asked again.
    """
    jobs = {id: judge_job(pack, work, answer) for id, (work, answer) in answers.items()}
    models.hooks.tell(f"{judge} judges the levels of {len(jobs):,} answers ...")
    limits = Limits(regenerations=_AGAIN, tries=models.config.max_tries)
    states = models.ask(judge, models.config.judge_endpoints, list(jobs.values()), opinions, limits)
    said = {id: states[job.id].answer if states[job.id].end == "passed" else None for id, job in jobs.items()}
    return {id: None if text is None else named_level(text, list(pack.levels)) for id, text in said.items()}


def far_off(
    pack: Pack, answers: Mapping[str, tuple[Work, str]], judged: Mapping[str, str | None], tolerance: int
) -> dict[str, list[str]]:
    """Ids of answers that the judge finds more levels off what was asked for -> the reason."""
    names = list(pack.levels)
    return {
        id: ["level"]
        for id, level in judged.items()
        if level is not None and abs(names.index(level) - names.index(answers[id][0].planned.level)) > tolerance
    }


def _identify(work: Work, answer: str) -> str:
    return hashlib.sha256(f"{work.id}\x1f{answer}".encode("utf-8", "replace")).hexdigest()[:16]
