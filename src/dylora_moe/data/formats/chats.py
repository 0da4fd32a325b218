"""Rows that are conversations: OpenAI messages, ShareGPT, and CIMA's tutoring exercises."""

from collections.abc import Mapping

from dylora_moe.data.example import ROLES, Message
from dylora_moe.data.formats.fields import Conversation, Row, list_field, text_field
from dylora_moe.errors import DataError

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "observation": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
}
# How a tool is called and answers, in words that models know: the tags of Hermes and Qwen.
# Source: https://github.com/NousResearch/Hermes-Function-Calling
_TAGS = {"function_call": "tool_call", "observation": "tool_response"}


def read_messages(row: Row, where: str) -> tuple[Conversation, ...]:
    """`messages`: a list of objects with `role` and `content`, the assistant's answer last."""
    found = list_field(row, "messages", where, of="role/content objects")
    return (tuple(_message(turn, f"{where}, message {index}") for index, turn in enumerate(found, start=1)),)


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: must be an object with role and content, got {type(turn).__name__}.")
    role = text_field(turn, "role", where, meaning="who speaks")
    if role not in ROLES:
        raise DataError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}. Drop the row.")
    if turn.get("tool_calls"):
        raise DataError(
            f"{where}: tool_calls are not read, and leaving them out would change the answer. Drop the row."
        )
    return Message(role=role, content=_content(turn, where))


def _content(turn: Row, where: str) -> str:
    """Text, or a list of parts that are all text, as in `[{"type": "text", "text": "hi"}]`."""
    content = turn.get("content")
    if not isinstance(content, list) or not content:
        return text_field(turn, "content", where, meaning="what is said")
    texts = []
    for index, part in enumerate(content, start=1):
        text = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise DataError(
                f"{where}: field 'content' (what is said), part {index}, must be text such as "
                f"{{type: text, text: hello}}, got {str(part)[:60]!r}. Drop the row."
            )
        texts.append(text)
    return text_field({"content": "".join(texts)}, "content", where, meaning="what is said")


def read_sharegpt(row: Row, where: str) -> tuple[Conversation, ...]:
    """`conversations`: a list of objects with `from` and `value`; optional `system` and `tools`.

    A call of a tool becomes an assistant turn and its result a user turn, both in tags; the list of tools goes before
    the conversation, into the system message.
    """
    found = list_field(row, "conversations", where, of="from/value objects")
    system = [text_field(row, name, where, meaning="before the conversation") for name in ("system",) if row.get(name)]
    if row.get("tools"):
        tools = text_field(row, "tools", where, meaning="the tools as JSON")
        system.append(f"You may call these tools:\n<tools>\n{tools}\n</tools>")
    said = [_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(found, start=1)]
    if system and said and said[0].role == "system":
        system.insert(0, said.pop(0).content)
    before = [Message(role="system", content="\n\n".join(system))] if system else []
    return ((*before, *said),)


def _turn(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: must be an object with from and value, got {type(turn).__name__}.")
    speaker = text_field(turn, "from", where, meaning="who speaks")
    if speaker not in _SPEAKERS:
        raise DataError(f"{where}: from must be one of {', '.join(_SPEAKERS)}, got {speaker!r}. Drop the row.")
    value = text_field(turn, "value", where, meaning="what is said")
    if tag := _TAGS.get(speaker):
        value = f"<{tag}>\n{value}\n</{tag}>"
    return Message(role=_SPEAKERS[speaker], content=value)


def read_cima(row: Row, where: str) -> tuple[Conversation, ...]:
    """One conversation for each of `tutorResponses`, which stay as the tutors wrote them.

    `past_convo` is the dialogue so far, the tutor first and the student last. The exercise itself (`engPrep`,
    `engColor`, `engObj`) is put before it as the student's turn, as most chat templates want a user first.

    Source: https://aclanthology.org/2020.bea-1.5, section 3.
    """
    past = list_field(row, "past_convo", where, of="turns, the student's last")
    if not past or len(past) % 2:
        raise DataError(
            f"{where}: field 'past_convo' must be pairs of a tutor's and a student's turn, got {len(past)} turns. "
            "Drop the row."
        )
    parts = [text_field(row, name, where, meaning="the exercise") for name in ("engPrep", "engColor", "engObj")]
    turns = [f'How do I say "{" ".join(parts)}" in Italian?', *_texts(past, f"{where}, past_convo")]
    before = tuple(Message(role="assistant" if index % 2 else "user", content=text) for index, text in enumerate(turns))
    replies = _texts(list_field(row, "tutorResponses", where, of="replies"), f"{where}, tutorResponses")
    if not replies:
        raise DataError(f"{where}: field 'tutorResponses' must hold a reply, got none. Drop the row.")
    return tuple((*before, Message(role="assistant", content=reply)) for reply in replies)


def _texts(items: list[object], where: str) -> list[str]:
    said = enumerate(items, start=1)
    return [text_field({f"item {index}": item}, f"item {index}", where, meaning="what is said") for index, item in said]
