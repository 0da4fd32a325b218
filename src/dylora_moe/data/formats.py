"""Raw row -> `Example`: one function a format, found by the names of the columns.

To add a format: write a function from a row to messages and give it one line in `FORMATS`.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from dylora_moe.data.example import ROLES, Example, Message
from dylora_moe.errors import DataError

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """How one kind of row is recognised and read.

    Attributes:
        columns: The columns that a row of this format has; of a group, any one will do.
        read: A row and where it stands (for errors) -> its messages, the answer last.
    """

    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Row, str], tuple[Message, ...]]

    def matches(self, columns: Collection[str]) -> bool:
        """Whether a row with these columns can be of this format."""
        return all(any(name in columns for name in group) for group in self.columns)

    def describe(self) -> str:
        """The columns as text, such as `instruction, output|response`."""
        return ", ".join("|".join(group) for group in self.columns)


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing where no known name is close."""
    # 0.5 and not difflib's 0.6: a swapped letter in a name as short as `mbpp` must be found.
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _text(row: Row, field: str, where: str, *, meaning: str) -> str:
    """The text of a field that must hold some."""
    if field not in row:
        raise DataError(
            f"{where}: field {field!r} ({meaning}) is missing; the row has {', '.join(map(str, row))}. "
            "Add it or drop the row."
        )
    value = row[field]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(
            f"{where}: field {field!r} ({meaning}) must be text, got {kind} {str(value)[:60]!r}. "
            "Write it as a string or drop the row."
        )
    if not value.strip():
        raise DataError(f"{where}: field {field!r} ({meaning}) must hold text, got {value!r}. Drop the row.")
    return value


def _turns(prompt: str, answer: str) -> tuple[Message, ...]:
    return Message(role="user", content=prompt), Message(role="assistant", content=answer)


def _alpaca(row: Row, where: str) -> tuple[Message, ...]:
    """`instruction`, optional `input`, `output` (or `response`)."""
    prompt = _text(row, "instruction", where, meaning="the prompt")
    if row.get("input") not in (None, ""):
        extra = row["input"]
        # A blank input is common in the wild and means "no input"; other types are a mistake.
        if not isinstance(extra, str) or extra.strip():
            prompt = f"{prompt}\n\n{_text(row, 'input', where, meaning='the input to the prompt')}"
    field = "output" if "output" in row or "response" not in row else "response"
    return _turns(prompt, _text(row, field, where, meaning="the answer"))


def _prompt_completion(row: Row, where: str) -> tuple[Message, ...]:
    """`prompt`, `completion`."""
    return _turns(
        _text(row, "prompt", where, meaning="the prompt"),
        _text(row, "completion", where, meaning="the answer"),
    )


def _gsm8k(row: Row, where: str) -> tuple[Message, ...]:
    """`question`, `answer`."""
    return _turns(
        _text(row, "question", where, meaning="the prompt"),
        _text(row, "answer", where, meaning="the answer"),
    )


def _mbpp(row: Row, where: str) -> tuple[Message, ...]:
    """`text` (or `prompt`), `code`, optional `test_list`.

    Source: the prompt of the MBPP paper, https://arxiv.org/abs/2108.07732, section 2.1 and figure 1.
    """
    field = "prompt" if "prompt" in row and "text" not in row else "text"
    prompt = _text(row, field, where, meaning="the task")
    tests = row.get("test_list")
    if tests is not None:
        # Parquet readers give other sequences than lists; text would be split into letters.
        if isinstance(tests, str | Mapping) or not isinstance(tests, Iterable):
            raise DataError(f"{where}: field 'test_list' must be a list of assert lines, got {type(tests).__name__}.")
        lines = "\n".join(str(test) for test in tests)
        prompt = f"{prompt} Your code should pass these tests:\n\n{lines}" if lines else prompt
    code = _text(row, "code", where, meaning="the answer")
    # 972 of the 974 rows as published have Windows line ends, which a model would learn to write.
    return _turns(prompt.replace("\r\n", "\n"), code.replace("\r\n", "\n"))


def _messages(row: Row, where: str) -> tuple[Message, ...]:
    """`messages`: a list of objects with `role` and `content`, the assistant's answer last."""
    turns = row.get("messages")
    if not isinstance(turns, Iterable) or isinstance(turns, str | Mapping):
        raise DataError(
            f"{where}: field 'messages' must be a list of role/content objects, got {type(turns).__name__}."
        )
    return tuple(_message(turn, f"{where}, message {index}") for index, turn in enumerate(turns, start=1))


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: must be an object with role and content, got {type(turn).__name__}.")
    role = _text(turn, "role", where, meaning="who speaks")
    if role not in ROLES:
        raise DataError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}. Drop the row.")
    return Message(role=role, content=_text(turn, "content", where, meaning="what is said"))


# The order is the order of detection: a row with more telling columns first.
FORMATS: Mapping[str, RowFormat] = {
    "messages": RowFormat(columns=(("messages",),), read=_messages),
    "mbpp": RowFormat(columns=(("text", "prompt"), ("code",)), read=_mbpp),
    "alpaca": RowFormat(columns=(("instruction",), ("output", "response")), read=_alpaca),
    "prompt_completion": RowFormat(columns=(("prompt",), ("completion",)), read=_prompt_completion),
    "gsm8k": RowFormat(columns=(("question",), ("answer",)), read=_gsm8k),
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
        "Rename the columns, or drop the row if the others are well."
    )


def row_to_example(row: Row, *, format: str, domain: str, source: str, licence: str | None, where: str) -> Example:
    """Read one row; `where` (file and row or line) stands at the front of every error.

    Raises:
        DataError: The format is unknown, or the row lacks a prompt or an answer.
    """
    if format not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.{nearest(format, FORMATS)}")
    messages = FORMATS[format].read(row, where)
    try:
        return Example(messages=messages, domain=domain, source=source, licence=licence)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
