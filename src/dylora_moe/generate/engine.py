"""Planned rows, many at a time, until each has passed or is set aside. What it learns goes into the log first."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from dylora_moe.errors import GeneratorError
from dylora_moe.generate.clients import Client, Failure, Reply, Request
from dylora_moe.generate.journal import Journal
from dylora_moe.generate.rows import Limits, RowState, advance

# Of waits after failures: the second is twice the first, up to the longest, drawn anew so that requests do not meet.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_LOOK_S = 0.2
# So many requests that are refused for good before any is answered are no fault of the rows.
_ALL_REFUSED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row to make.

    Attributes:
        id: Of its content, by which the log knows it.
        ask: Reasons why the last answer did not pass, none for the first, and how many came before -> what to send.
        check: An answer -> reasons why it does not pass, none where it does.
    """

    id: str
    ask: Callable[[Sequence[str], int], Request]
    check: Callable[[Reply], Sequence[str]]


@dataclass(slots=True)
class Tally:
    """What happened since this process began, for people who wait."""

    passed: int = 0
    set_aside: int = 0
    requests: int = 0
    failures: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        """That came to their end."""
        return self.passed + self.set_aside


class _Health:
    """Whether the generator answers at all; while it does not, one request at a time asks again.

    Args:
        failures: In a row, of all requests, from which on it is taken for down.
        patience_s: That it may be down.
        good: A job that it has answered.

    Attributes:
        good: The last one that it has answered; None where it has answered none.
    """

    def __init__(self, *, failures: int, patience_s: float, good: Job | None) -> None:
        self._most, self._patience_s, self.good = failures, patience_s, good
        self._in_a_row, self._asked, self._since, self._refused = 0, 0, 0.0, 0
        self._last: Failure | None = None
        self._one = asyncio.Lock()

    @property
    def is_down(self) -> bool:
        return self._in_a_row >= self._most

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A request's time: at once, or alone and after a wait where the generator is down."""
        if not self.is_down:
            yield
            return
        async with self._one:
            if self.is_down:
                await asyncio.sleep(min(_FIRST_WAIT_S * 2 ** min(self._asked, 20), _LONGEST_WAIT_S))
                self._asked += 1
            yield

    def answered(self, job: Job) -> None:
        self.good = job
        self._in_a_row = self._asked = 0

    def refused(self, failure: Failure) -> None:
        self._refused += 1
        self._last = failure

    def failed(self, failure: Failure) -> None:
        self._in_a_row += 1
        self._last = failure
        if self._in_a_row == 1:
            self._since = time.monotonic()

    def check(self) -> None:
        """Give up where it has been down for too long, or refuses whatever it is asked.

        Raises:
            GeneratorError: It is so.
        """
        if self._last is not None and self.good is None and self._refused >= _ALL_REFUSED:
            raise GeneratorError(
                f"the generator must take what is asked of it, and it refused the first {self._refused} requests, the "
                f"last at {self._last.where}: {self._last.reason}, {self._last.said!r}. Change the recipe or the "
                "server, and start the same command with --retry: the rows that were refused are set aside."
            )
        down_s = time.monotonic() - self._since
        if self._last is not None and self.is_down and down_s > self._patience_s:
            raise GeneratorError(
                f"the generator must answer now and then, and the last {self._in_a_row} requests failed in "
                f"{down_s:.0f} s, the last at {self._last.where}: {self._last.reason}. Nothing is lost: see that it "
                "runs, and start the same command."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Runs jobs with a client.

    Attributes:
        client: Answers.
        journal: Open.
        limits: How often a row is tried.
        in_flight: Requests at a time.
        patience_s: That the generator may be down before this gives up.
        check: Raises where a signal asked to end; called a few times a second.
        tell: Takes the tally, a few times a second.
    """

    client: Client
    journal: Journal
    limits: Limits
    in_flight: int
    patience_s: float
    check: Callable[[], None] = lambda: None
    tell: Callable[[Tally], None] = lambda tally: None

    def run(self, jobs: Sequence[Job], states: Mapping[str, RowState]) -> dict[str, RowState]:
        """Work on the open ones, and return the states of all.

        Args:
            jobs: In the order in which they are begun.
            states: Of those that the log knows.

        Raises:
            GeneratorError: The generator will not answer, or has not for longer than `patience_s`.
        """
        found = {job.id: states.get(job.id, RowState()) for job in jobs}
        asyncio.run(self._run(jobs, found))
        return found

    async def _run(self, jobs: Sequence[Job], states: dict[str, RowState]) -> None:
        waiting = [job for job in jobs if states[job.id].end is None]
        tally, queue, at_once = Tally(), iter(waiting), min(self.in_flight, len(waiting))
        health = _Health(
            # Fewer than would set a row aside, however they fall.
            failures=min(2 * at_once + 8, max(1, self.limits.tries - 1) * at_once),
            patience_s=self.patience_s,
            good=next((job for job in jobs if states[job.id].end == "passed"), None),
        )

        async def work() -> None:
            for job in queue:  # shared: each takes the next
                await self._finish(job, states, tally, health)

        workers = [asyncio.create_task(work()) for _ in range(at_once)]
        try:
            pending = set(workers)
            while pending:
                done, pending = await asyncio.wait(pending, timeout=_LOOK_S, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                self.tell(tally)
                self.check()
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self.client.close()

    async def _finish(self, job: Job, states: dict[str, RowState], tally: Tally, health: _Health) -> None:
        while (state := states[job.id]).end is None:
            async with health.turn():
                event, wait = await self._try(job, state, tally, health)
            self.journal.add(event)
            states[job.id] = state = advance(state, event, self.limits)
            health.check()
            if wait and state.end is None:
                await asyncio.sleep(wait)
        tally.passed += states[job.id].end == "passed"
        tally.set_aside += states[job.id].end == "set_aside"

    async def _answers(self, health: _Health) -> bool:
        """Whether what it has answered once is answered again, so that failures are the fault of their rows."""
        if health.good is None:
            return False
        event: dict[str, Any] = {"id": health.good.id, "kind": "probe", "time": round(time.time(), 3)}
        try:
            reply = await self.client.complete(health.good.ask((), 0))
        except Failure as failure:
            self.journal.add(event | {"reasons": [failure.reason], "where": failure.where})
            return False
        event |= {"reasons": [], "where": reply.where, "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
        self.journal.add(event)
        health.answered(health.good)
        return True

    async def _try(self, job: Job, state: RowState, tally: Tally, health: _Health) -> tuple[dict[str, Any], float]:
        """One request -> its event, and seconds to wait before the next."""
        began = time.monotonic()
        event: dict[str, Any] = {"id": job.id, "time": round(time.time(), 3)}
        tally.requests += 1
        try:
            reply = await self.client.complete(job.ask(state.reasons, state.before + state.answers))
        except Failure as failure:
            tally.failures += 1
            event |= {"kind": "failure", "reasons": [failure.reason], "where": failure.where}
            event["seconds"] = round(time.monotonic() - began, 3)
            event |= {"said": failure.said} if failure.said else {}
            if failure.is_final:
                health.refused(failure)
                return event | {"final": True}, 0.0
            health.failed(failure)
            if health.is_down and not await self._answers(health):
                return event | {"outage": True}, 0.0
            wait = _FIRST_WAIT_S * 2 ** min(state.failures, 20) * random.uniform(0.5, 1.5)
            return event, min(wait, _LONGEST_WAIT_S)  # a machine that asks for more is left alone by the client
        health.answered(job)
        tally.tokens_in += reply.tokens_in or 0
        tally.tokens_out += reply.tokens_out or 0
        event |= {"kind": "answer", "text": reply.text, "reasons": list(job.check(reply))}
        event |= {"seconds": round(time.monotonic() - began, 3), "where": reply.where}
        return event | {"tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}, 0.0
