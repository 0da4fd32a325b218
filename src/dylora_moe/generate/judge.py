"""A second opinion on levels: another model is asked for the level of every answer that passed."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dylora_moe.generate.asking import Models, replay
from dylora_moe.generate.clients import Reply, Request
from dylora_moe.generate.engine import Job
from dylora_moe.generate.journal import Journal
from dylora_moe.generate.packs import Pack
from dylora_moe.generate.prepare import Work
from dylora_moe.generate.rows import Limits

UNCLEAR = "no level"
_MAX_TOKENS, _AGAIN = 16, 2  # of a reply; replies after one that names no level

Answers = Mapping[str, tuple[Work, str]]
"""Id of a row -> what was planned, and its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of asking for the level of an answer.

    Attributes:
        work: That it answers.
        answer: That was judged.
        level: That the judge named; None where it named none, or did not answer.
        failure: Why it did not answer, where it did not.
    """

    work: Work
    answer: str
    level: str | None
    failure: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A model that names levels.

    Attributes:
        model: Its name.
        models: Asks it.
        pack: Has the levels, and says how it is asked.
        opinions: The log; what is in it is not asked again.
    """

    model: str
    models: Models
    pack: Pack
    opinions: Journal

    @property
    def limits(self) -> Limits:
        """How often it is asked for one answer."""
        return Limits(regenerations=_AGAIN, tries=self.models.config.max_tries)

    def far_off(self, answers: Answers, tolerance: int) -> dict[str, list[str]]:
        """Ask for the levels of answers -> ids of those that are more levels off what was asked for, and the reason."""
        jobs = [self.job(work, answer) for work, answer in answers.values()]
        self.models.hooks.tell(f"{self.model} judges the levels of {len(jobs):,} answers ...")
        self.models.ask(self.model, self.models.config.judge_endpoints, jobs, self.opinions, self.limits)
        return {
            verdict.work.id: ["level"]
            for verdict in self.verdicts(answers.values())
            if verdict.level is not None and self.pack.apart(verdict.level, verdict.work.planned.level) > tolerance
        }

    def verdicts(self, answers: Iterable[tuple[Work, str]]) -> list[Verdict]:
        """What the log has on answers; those that were not judged are left out."""
        jobs = [(work, answer, self.job(work, answer).id) for work, answer in answers]
        states = replay(self.opinions, [id for _, _, id in jobs], self.limits)
        found = []
        for work, answer, id in jobs:
            state = states[id]
            if state.end is not None:
                named = named_level(state.answer or "", list(self.pack.levels)) if state.end == "passed" else None
                found.append(Verdict(work=work, answer=answer, level=named, failure=state.failure))
        return found

    def job(self, work: Work, answer: str) -> Job:
        """What is asked of an answer. Its id has the judge and all that is asked: what changes is asked anew."""
        messages, names = self.pack.judge(work.question.messages, answer), list(self.pack.levels)

        def ask(reasons: Sequence[str], answers: int) -> Request:
            warmer = 0.0 if answers == 0 else 0.7  # the same question again gets the same reply
            return Request(messages=messages, max_tokens=_MAX_TOKENS, temperature=warmer, top_p=1.0, seed=answers)

        def check(reply: Reply) -> list[str]:
            return [] if named_level(reply.text, names) is not None else [UNCLEAR]

        whole = [self.model, work.id, names, [turn.content for turn in messages]]
        id = hashlib.sha256(json.dumps(whole).encode("utf-8", "replace")).hexdigest()[:16]
        return Job(id=id, ask=ask, check=check)


def named_level(text: str, levels: Sequence[str]) -> str | None:
    """The only level that a reply names; None where it names none or several.

    A level whose name is part of another's is not named by that one; one of a single letter must be a capital, since
    "a" is a word.
    """
    said = text.strip().strip(".\"'`* ")
    if exact := [level for level in levels if level.casefold() == said.casefold()]:
        return exact[0]
    named = set[str]()
    for level in sorted(levels, key=len, reverse=True):
        flags = re.IGNORECASE if len(level) > 1 else 0
        pattern = re.compile(rf"(?<![\w-]){re.escape(level)}(?![\w+])", flags)
        if pattern.search(text):
            named.add(level)
            text = pattern.sub(" ", text)
    return named.pop() if len(named) == 1 else None


def summary(model: str, verdicts: Sequence[Verdict], opinions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a judge did, in numbers.

    Args:
        model: Its name.
        verdicts: Of all answers that passed what comes before it.
        opinions: Its events of the log.
    """
    return {
        "model": model,
        "judged": len(verdicts),
        "unclear": sum(verdict.level is None and not verdict.failure for verdict in verdicts),
        "failed": sum(bool(verdict.failure) for verdict in verdicts),
        "requests": len(opinions),
        "tokens_in": sum(event.get("tokens_in") or 0 for event in opinions),
        "tokens_out": sum(event.get("tokens_out") or 0 for event in opinions),
    }
