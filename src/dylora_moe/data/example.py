"""The one record that all data becomes: a conversation that ends with the answer to learn."""

from dataclasses import dataclass

from dylora_moe.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation whose last turn, always the assistant's, is what a model learns to write.

    Attributes:
        messages: All turns in order, the answer last.
        domain: The skill or subject that the example belongs to; losses are reported per domain.
        source: The data set that it came from, by its name in the registry or as a file name.
        licence: SPDX identifier of the text, or None where it is unknown.

    Raises:
        DataError: A role is unknown, no user turn comes before the answer, the answer is blank, or text is no Unicode.
    """

    messages: tuple[Message, ...]
    domain: str
    source: str
    licence: str | None = None

    def __post_init__(self) -> None:
        roles = [message.role for message in self.messages]
        unknown = [role for role in roles if role not in ROLES]
        if unknown:
            raise DataError(
                f"The role of a message must be one of {', '.join(ROLES)}, got {unknown[0]!r} "
                f"({self._where}). Map the roles of the data set to these three."
            )
        if not roles or roles[-1] != "assistant":
            raise DataError(
                f"The last message must be the assistant's answer, got roles {roles} ({self._where}). "
                "Cut the conversation after an assistant turn or drop the row."
            )
        if "user" not in roles[:-1]:
            raise DataError(
                f"A user message must come before the answer, got roles {roles} ({self._where}). "
                "Put the question into a user message or drop the row."
            )
        for message in self.messages:
            if not _is_encodable(message.content):
                raise DataError(
                    f"Text must be valid Unicode, got half of a surrogate pair in {message.content[:60]!r} "
                    f"({self._where}). Mend the row or drop it."
                )
        if not self.answer.strip():
            raise DataError(f"The answer must hold text, got {self.answer!r} ({self._where}). Drop the row.")

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return self.messages[-1].content

    @property
    def _where(self) -> str:
        return f"source {self.source!r}, domain {self.domain!r}"


def _is_encodable(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def instruction_example(
    instruction: str,
    answer: str,
    *,
    domain: str,
    source: str,
    licence: str | None = None,
    system: str | None = None,
) -> Example:
    """Make the example of one instruction and one answer, with an optional system message before them.

    Raises:
        DataError: The answer is blank.
    """
    turns = [Message(role="user", content=instruction), Message(role="assistant", content=answer)]
    if system is not None:
        turns.insert(0, Message(role="system", content=system))
    return Example(messages=tuple(turns), domain=domain, source=source, licence=licence)
