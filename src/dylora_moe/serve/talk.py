"""A conversation with a run: questions in, streams of answers out, and a record of who answered what."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dylora_moe.data.example import Message
from dylora_moe.data.templates import end_token_id, render_prompt
from dylora_moe.errors import DyLoraError, ServeError
from dylora_moe.evaluate.load import Speaker
from dylora_moe.serve.engine import Engine
from dylora_moe.serve.request import Finish, Piece, Request, Stream, TooLong


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one speaker answered; `pieces` may end early where a person stopped it."""

    speaker: Speaker
    pieces: Sequence[Piece]
    finish: Finish

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def shares(self) -> dict[str, float] | None:
        """Share of each expert in the answer's tokens; none where the base served them all, None if no router decided.

        The rest up to 1 is the base's.
        """
        if self.speaker.kind != "routed":
            return None
        decided = [piece.experts for piece in self.pieces if piece.experts is not None]
        names = dict.fromkeys(name for experts in decided for name in experts)
        return {name: sum(experts.get(name, 0.0) for experts in decided) / len(decided) for name in names}

    def record(self) -> dict[str, Any]:
        """As it is saved beside its text."""
        shares = None if self.shares is None else {name: round(share, 4) for name, share in self.shares.items()}
        return {"speaker": self.speaker.name, "finish": self.finish, "experts": shares}


@dataclass(slots=True, kw_only=True)
class Turn:
    """One question, its answer, and answers to compare it with."""

    question: str
    answer: Answer | None = None
    compared: list[Answer] = field(default_factory=list)


class Talk:
    """Conversations with one engine, one after the other.

    Args:
        engine: Over the run's model.
        max_tokens: Longest answer; a shorter one where the base's context leaves less room.
        system: A system message before the conversation.
    """

    def __init__(self, engine: Engine, *, max_tokens: int, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Turn] = []
        self._earlier: list[dict[str, Any]] = []
        self._engine, self._max_tokens = engine, max_tokens
        self._end = end_token_id(engine.tokenizer)

    def ask(self, question: str, speaker: Speaker, show: Callable[[Piece], None]) -> Answer:
        """Ask one more question; Ctrl-C ends its answer, and what was written of it stays in the conversation.

        Args:
            question: Of a person.
            speaker: Who answers.
            show: Called with each piece as it comes.

        Raises:
            ServeError: There is no answer; then the conversation is as before.
            TunerError: There is no such expert.
        """
        turn = Turn(question=question)
        self.turns.append(turn)
        try:
            (stream,) = self._streams([speaker])
            pieces: list[Piece] = []
            try:
                for piece in stream:
                    pieces.append(piece)
                    show(piece)
            except KeyboardInterrupt:
                stream.cancel()
            finish = pieces[-1].finish if pieces else None
            answer = Answer(speaker=speaker, pieces=pieces, finish=finish or "cancelled")
            if answer.text or answer.finish != "cancelled":
                turn.answer = answer
        finally:
            if turn.answer is None:  # a question without an answer would stand before the next one
                self.turns.remove(turn)
        return answer

    def compare(self, speakers: Sequence[Speaker]) -> list[Answer]:
        """The last question, answered by each of them at once; the conversation stays as it is.

        Raises:
            ServeError: Nothing was asked yet, or there is no answer.
            TunerError: There is no such expert.
        """
        if not self.turns:
            raise ServeError("a question must have been asked to be compared, and none was. Ask one.")
        streams = self._streams(speakers)
        try:
            found = [list(stream) for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()
        answers = [
            Answer(speaker=speaker, pieces=pieces, finish=pieces[-1].finish or "cancelled")
            for speaker, pieces in zip(speakers, found, strict=True)
        ]
        self.turns[-1].compared = answers
        return answers

    def clear(self) -> None:
        """Begin a new conversation; the system message stays."""
        if self.turns:
            self._earlier.append(self._record())
        self.turns = []

    def save(self, path: Path) -> int:
        """Write all conversations, a line each, to a new file; give their number.

        Raises:
            ServeError: There is such a file, or it cannot be written.
        """
        records = [*self._earlier, *([self._record()] if self.turns else [])]
        try:
            with path.expanduser().open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        except FileExistsError as error:
            raise ServeError(f"the file must be new, and there is {path} already. Choose another name.") from error
        except (OSError, ValueError) as error:  # of a zero byte in the name
            raise ServeError(f"{path} must be a file that can be written: {error}.") from error
        return len(records)

    def _streams(self, speakers: Sequence[Speaker]) -> list[Stream]:
        """The last question, put to each of them in one batch."""
        try:
            text = render_prompt(self._messages(before_last_answer=True), self._engine.tokenizer)
        except Exception as error:  # templates raise jinja2's errors, or Python's own from their expressions
            raise ServeError(f"the conversation must be such as the run's template takes: {error}.") from error
        prompt = self._engine.encode(text, add_special_tokens=False)
        room = self._max_tokens
        if self._engine.context is not None:
            room = min(room, self._engine.context - len(prompt))
            if room < 1:
                raise TooLong(
                    f"the conversation must leave room for an answer in the base's context of {self._engine.context} "
                    f"tokens, and it has {len(prompt)}. Begin a new one with /clear, or ask something shorter."
                )
        streams: list[Stream] = []
        try:
            for speaker in speakers:
                request = Request(prompt=prompt, speaker=speaker, max_tokens=room, end_token_ids=[self._end])
                streams.append(self._engine.submit(request))
        except DyLoraError:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    def _messages(self, *, before_last_answer: bool) -> list[Message]:
        messages = [Message(role="system", content=self.system)] if self.system else []
        for turn in self.turns:
            messages.append(Message(role="user", content=turn.question))
            if turn.answer is not None and not (before_last_answer and turn is self.turns[-1]):
                messages.append(Message(role="assistant", content=turn.answer.text))
        return messages

    def _record(self) -> dict[str, Any]:
        """Messages as data to train on has them, and beside them who gave each answer."""
        turns = [turn for turn in self.turns if turn.answer is not None]
        messages = [{"role": each.role, "content": each.content} for each in self._messages(before_last_answer=False)]
        return {
            "messages": messages,
            "answered": [turn.answer.record() for turn in turns if turn.answer is not None],
            "compared": [
                {
                    "question": turn.question,
                    "answers": [each.record() | {"content": each.text} for each in turn.compared],
                }
                for turn in turns
                if turn.compared
            ],
        }
