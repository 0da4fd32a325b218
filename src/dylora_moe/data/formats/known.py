"""Raw row -> `Example`s: one function a format, found by the names of the columns.

To add a format: write a function from a row to conversations and give it one line in `FORMATS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dylora_moe.data.example import Example
from dylora_moe.data.formats.chats import read_cima, read_messages, read_sharegpt
from dylora_moe.data.formats.fields import Conversation, Row, nearest
from dylora_moe.data.formats.labels import read_classification, read_translation, translation_of
from dylora_moe.data.formats.pairs import read_alpaca, read_gsm8k, read_mbpp, read_prompt_completion, read_text
from dylora_moe.data.languages import language_columns
from dylora_moe.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """How one kind of row is recognised and read.

    Attributes:
        columns: The columns that a row of this format has; of a group, any one will do.
        read: A row and where it stands (for errors) -> its conversations, each with the answer last.
        recognise: Decides instead of `columns` where their names are open; `columns` then only describe.
    """

    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Row, str], tuple[Conversation, ...]]
    recognise: Callable[[Row], bool] | None = None

    def matches(self, row: Row) -> bool:
        """Whether a row can be of this format."""
        if self.recognise is not None:
            return self.recognise(row)
        return all(any(name in row for name in group) for group in self.columns)

    def describe(self) -> str:
        """The columns as text, such as `instruction, output|response`."""
        return ", ".join("|".join(group) for group in self.columns)


def _is_translation(row: Row) -> bool:
    return len(language_columns(translation_of(row))) == 2


# The order is the order of detection: a row with more telling columns first.
FORMATS: Mapping[str, RowFormat] = {
    "messages": RowFormat(columns=(("messages",),), read=read_messages),
    "sharegpt": RowFormat(columns=(("conversations",),), read=read_sharegpt),
    "cima": RowFormat(columns=(("past_convo",), ("tutorResponses",)), read=read_cima),
    "mbpp": RowFormat(columns=(("text", "prompt"), ("code",)), read=read_mbpp),
    "alpaca": RowFormat(columns=(("instruction",), ("input",), ("output", "response")), read=read_alpaca),
    "evol": RowFormat(columns=(("instruction",), ("output", "response")), read=read_alpaca),
    "prompt_completion": RowFormat(columns=(("prompt",), ("completion", "answer")), read=read_prompt_completion),
    "gsm8k": RowFormat(columns=(("question",), ("answer",)), read=read_gsm8k),
    "classification": RowFormat(columns=(("sentence", "text"), ("label",)), read=read_classification),
    "translation": RowFormat(
        columns=(("english, italian (any two languages)",),), read=read_translation, recognise=_is_translation
    ),
    "text": RowFormat(columns=(("text",),), read=read_text),
}


def detect_format(row: Row) -> str:
    """The name of the first format in `FORMATS` whose columns the row has.

    Raises:
        DataError: No format has such columns.
    """
    for name, row_format in FORMATS.items():
        if row_format.matches(row):
            return name
    known = "; ".join(f"{name} ({row_format.describe()})" for name, row_format in FORMATS.items())
    columns = ", ".join(map(str, row)) or "none"
    raise DataError(
        f"The columns of a row must fit a known format: {known}. Got columns: {columns}. "
        "Map them, such as columns: {prompt: question, answer: reply}, or drop the row if the others are well."
    )


def row_to_examples(
    row: Row, *, format: str, domain: str, source: str, licence: str | None, where: str
) -> tuple[Example, ...]:
    """Read one row; `where` (file and row or line) stands at the front of every error.

    Most formats give one example a row; CIMA's exercises give one a tutor's reply.

    Raises:
        DataError: The format is unknown, or the row lacks a prompt or an answer.
    """
    if format not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.{nearest(format, FORMATS)}")
    conversations = FORMATS[format].read(row, where)
    try:
        return tuple(
            Example(messages=messages, domain=domain, source=source, licence=licence) for messages in conversations
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
