"""Requests in, pieces of answers out: one thread owns the model and answers many rows in each pass."""

import logging
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.batching import pad_token_id
from dylora_moe.serve.queue import FairQueue
from dylora_moe.serve.request import Broken, Closed, Finish, Full, Piece, Request, Stream, TimedOut, TooLong
from dylora_moe.serve.rows import Rows, Served, empty_cache
from dylora_moe.serve.sampling import Draw, choose, log_probabilities
from dylora_moe.serve.text import StopStrings, TextStream
from dylora_moe.tuner import BASE, ROUTED, DyLoraModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine may hold at a time.

    Attributes:
        rows: Answers in one pass.
        tokens: Of keys and values: rows times the longest that any of them can become.
        prefill_tokens: Of prompts read in one pass, padding counted; a longer one is read alone. Rows that are being
            answered wait for that pass.
        waiting: Requests that wait for a place.
        share: Of the rows, that one client may have while others wait.
    """

    rows: int = 64
    tokens: int = 65_536
    prefill_tokens: int = 2_048
    waiting: int = 256
    share: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The engine at one moment.

    Attributes:
        rows: That are being answered.
        waiting: Requests without a place.
        tokens: That the cache holds, padding counted.
    """

    rows: int
    waiting: int
    tokens: int


class _Job:
    """One request on its way."""

    def __init__(self, request: Request, prompt: list[int], speaker: int, engine: "Engine") -> None:
        self.request, self.prompt, self.speaker, self.client = request, prompt, speaker, request.client
        self.stream = Stream(len(prompt), engine.wake)
        self.most_tokens = len(prompt) + request.max_tokens
        self.deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self.last = 0
        """The token that it reads next."""
        self.has_ended = False
        self._random = random.Random(request.seed)
        self._text, self._stops = TextStream(engine.tokenizer), StopStrings[Piece](request.stop)

    def draw(self) -> Draw:
        """How its next token is chosen."""
        chance = self._random.random() if self.request.temperature > 0 else 0.0
        return Draw(temperature=self.request.temperature, top_p=self.request.top_p, chance=chance)

    def add(self, piece: Piece) -> None:
        """Hand out one more token, with as much of its text as is certain."""
        assert piece.token_id is not None
        self.last = piece.token_id
        self.stream.completion_tokens += 1
        finish: Finish | None = "length" if self.stream.completion_tokens >= self.request.max_tokens else None
        if piece.token_id in self.request.end_token_ids:
            finish, text, piece = "stop", "", replace(piece, token_id=None, logprob=None, top_logprobs=None)
        else:
            text = self._text.add(piece.token_id)
        if finish is not None:
            text += self._text.rest()
        given, stopped = self._stops.add(piece, text)
        if stopped:
            finish = "stop"
        elif finish is not None:
            given += self._stops.rest()
        pieces = [replace(each, text=text) for each, text in given]
        if finish is not None:
            pieces[-1] = replace(pieces[-1], finish=finish)
            self.has_ended = True
        self.stream.put(*pieces)

    def fail(self) -> None:
        """Tell its reader that it is not answered, and nothing of why."""
        self.has_ended = True
        self.stream.put(Broken("the pass that wrote this answer failed; the server's log says why. Try again."))

    def is_over(self, now: float) -> bool:
        """Whether it ended, or nobody waits for it any more; then its reader is told."""
        if self.has_ended:
            return True
        if self.stream.is_cancelled:
            self.stream.put(Piece(text="", token_id=None, finish="cancelled"))
            return True
        if self.deadline is not None and now > self.deadline:
            written = self.stream.completion_tokens
            self.stream.put(
                TimedOut(
                    f"an answer must be complete within {self.request.timeout_s:g} s, and {written} tokens were "
                    "written by then. Ask for fewer tokens, or later."
                )
            )
            return True
        return False


class Engine:
    """Answers requests, many in one pass; one that comes while others run joins at the next token.

    Args:
        model: In evaluation mode; nothing else may use it until the engine is closed.
        tokenizer: Of the base.
        limits: What may be held at a time.

    Raises:
        ServeError: The base keeps a state of its tokens that cannot be joined.
    """

    def __init__(self, model: DyLoraModel, tokenizer: PreTrainedTokenizerBase, limits: Limits | None = None) -> None:
        self.model, self.tokenizer, self.limits = model.eval(), tokenizer, limits or Limits()
        empty_cache(model)
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0) or None
        embeddings: Any = model.lm.get_input_embeddings()
        self._vocabulary = int(embeddings.weight.shape[0])
        self._names = model.expert_names
        self._pad = pad_token_id(tokenizer)
        self._queue: FairQueue[_Job] = FairQueue(int(self.limits.rows * self.limits.share))
        self._changed, self._encoding = threading.Condition(), threading.Lock()
        self._is_closing = self._is_dropping = self._is_broken = False
        self._jobs, self._coming = list[_Job](), list[_Job]()
        self._rows: Rows | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Queue a request.

        Raises:
            Full: Too many wait already.
            TooLong: The prompt and the answer are longer than the base's context, or than there will ever be room.
            TunerError: There is no such expert.
            Closed: The engine is closed.
        """
        kind, expert = request.speaker.kind, request.speaker.expert
        speaker = {"routed": ROUTED, "base": BASE}[kind] if expert is None else self.model.index_of(expert)
        job = _Job(request, self._prompt(request), speaker, self)
        with self._changed:
            if self._is_closing:
                raise Closed("the engine must be open to take a request, and it is closing. Ask another one.")
            if len(self._queue) >= self.limits.waiting:
                raise Full(f"at most {self.limits.waiting} requests may wait, and as many do. Try again later.")
            self._queue.append(job)
            self._changed.notify()
        return job.stream

    @property
    def most_tokens(self) -> int:
        """That a prompt and its answer may have together."""
        return min(self.limits.tokens, self.context or self.limits.tokens)

    @property
    def is_alive(self) -> bool:
        """False once it ended though nobody told it to."""
        return not self._is_broken

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; of a template's, which has its special tokens, or of plain text, which wants some."""
        with self._encoding:  # tokenizers of transformers are for one thread at a time
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def snapshot(self) -> Snapshot:
        """How busy it is."""
        rows = self._rows
        tokens = len(rows) * max(rows.lengths, default=0) if rows is not None else 0
        return Snapshot(rows=len(self._jobs), waiting=len(self._queue), tokens=tokens)

    def wake(self) -> None:
        """Look again at who still waits."""
        with self._changed:
            self._changed.notify()

    def close(self, *, drain: bool = True, grace_s: float | None = None) -> None:
        """Take no more requests, and end.

        Args:
            drain: Finish what was taken; else it is cancelled.
            grace_s: Longest time to finish in, after which the rest is cancelled; None for no limit.
        """
        with self._changed:
            self._is_closing, self._is_dropping = True, not drain
            self._changed.notify()
        self._thread.join(grace_s)
        if self._thread.is_alive():
            with self._changed:
                self._is_dropping = True
            self._thread.join()

    def _prompt(self, request: Request) -> list[int]:
        text = request.prompt
        prompt = (
            self.encode(text, add_special_tokens=False) if isinstance(text, str) else [int(token) for token in text]
        )
        rows = self._vocabulary
        if not prompt or not all(0 <= token < rows for token in prompt):
            raise TooLong(f"a prompt must have at least one token, each from 0 to {rows - 1}, got {prompt[:20]}.")
        whole = len(prompt) + request.max_tokens
        if self.context is not None and whole > self.context:
            raise TooLong(
                f"prompt and answer must fit into the context of {self.context} tokens, got {len(prompt)} and "
                f"{request.max_tokens}. Shorten the prompt, or ask for fewer tokens."
            )
        if whole > self.limits.tokens:
            raise TooLong(
                f"prompt and answer must have at most {self.limits.tokens} tokens here, got {len(prompt)} and "
                f"{request.max_tokens}. Shorten the prompt, or ask for fewer tokens."
            )
        return prompt

    def _run(self) -> None:
        try:
            while self._go_on():
                pass
        except BaseException:  # such as SystemExit of a library: nobody may wait for a thread that is no more
            with self._changed:
                self._is_closing = self._is_broken = True
            logger.exception("the engine ended")
            self._fail_all()

    def _go_on(self) -> bool:
        """One turn; whether there is another."""
        try:
            with self._changed:
                while not (self._jobs or self._queue or self._is_closing):
                    self._changed.wait()
                if self._is_closing and not (self._jobs or self._queue):
                    return False
                staying, self._coming = self._sort_out()
            self._turn(staying, self._coming)
            self._coming = []
        except Exception:  # whose it is cannot be told here
            logger.exception("a turn of the engine failed")
            self._fail_all()
        return True

    def _sort_out(self) -> tuple[list[int], list[_Job]]:
        """Rows that stay, and requests that come; who is gone is let go."""
        now = time.monotonic()
        if self._is_dropping:
            for job in [*self._jobs, *self._queue]:
                job.stream.is_cancelled = True
        for job in self._queue:
            if job.is_over(now):
                self._queue.remove(job)
        staying = [row for row, job in enumerate(self._jobs) if not job.is_over(now)]
        jobs = [self._jobs[row] for row in staying]
        return staying, self._queue.take([job.client for job in jobs], lambda taken, job: self._fits(jobs, taken, job))

    def _fits(self, running: Sequence[_Job], taken: Sequence[_Job], job: _Job) -> bool:
        whole = [*running, *taken, job]
        if len(whole) > self.limits.rows or len(whole) * max(each.most_tokens for each in whole) > self.limits.tokens:
            return False
        prompts = [len(each.prompt) for each in (*taken, job)]
        return not taken or len(prompts) * max(prompts) <= self.limits.prefill_tokens

    def _turn(self, staying: list[int], new: list[_Job]) -> None:
        """One token for each row that stays, after the prompts of those that come."""
        parts: list[tuple[Rows, list[int]]] = []
        jobs = [self._jobs[row] for row in staying]
        if self._rows is not None and staying:
            parts.append((self._rows, staying))
        try:
            if new and (rows := self._prefill(new)) is not None:
                going_on = [row for row, job in enumerate(new) if not job.has_ended]
                jobs += [new[row] for row in going_on]
                parts += [(rows, going_on)] if going_on else []
            if len(parts) == 1 and len(parts[0][0]) == len(parts[0][1]):
                self._rows = parts[0][0]
            else:
                self._rows = Rows.joined(parts) if parts else None
            self._jobs = jobs
            if self._rows is not None:
                self._hand_out(jobs, self._rows.step([job.last for job in jobs]))
        except Exception as error:  # of whatever kind: others still wait for the engine
            self._fail(jobs, error)
            self._rows, self._jobs = None, []

    def _prefill(self, new: list[_Job]) -> Rows | None:
        """Prompts read, and first tokens handed out; None where that failed."""
        try:
            prompts, speakers = [job.prompt for job in new], [job.speaker for job in new]
            rows, served = Rows.prefilled(self.model, prompts, speakers, self._pad)
            self._hand_out(new, served)
        except Exception as error:  # rows that are being answered are no part of it
            self._fail(new, error)
            return None
        return rows

    def _hand_out(self, jobs: Sequence[_Job], served: Served) -> None:
        """Choose each row's token and give it to its reader."""
        tokens = choose(served.logits, [job.draw() for job in jobs])
        logs = log_probabilities(served.logits, tokens, [job.request.logprobs for job in jobs])
        for job, token, log, gates in zip(jobs, tokens, logs, served.gates, strict=True):
            experts = None
            if job.speaker != BASE:
                experts = {name: gate for name, gate in zip(self._names, gates, strict=True) if gate > 0}
            logprob, top = log or (None, None)
            try:
                job.add(Piece(text="", token_id=token, logprob=logprob, top_logprobs=top, experts=experts))
            except Exception as error:  # the other rows' tokens are as good as before
                self._fail([job], error)

    def _fail(self, jobs: Sequence[_Job], error: Exception) -> None:
        logger.exception("a pass of %d rows failed", len(jobs), exc_info=error)
        for job in jobs:
            job.fail()

    def _fail_all(self) -> None:
        with self._changed:
            jobs = [*self._jobs, *self._coming, *self._queue]
            self._rows, self._jobs, self._coming = None, [], []
            for job in self._queue:
                self._queue.remove(job)
        for job in jobs:
            job.fail()
