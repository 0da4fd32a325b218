"""The chat template of a base: its own, a file's or ours; how it writes a conversation, and what ends an answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.example import Message
from dylora_moe.errors import DataError

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
_BOS = "{{ bos_token }}"
_PROBE = "Answer42"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What a template writes after an answer: all of it, the part that is learned, and the end token."""

    text: str
    learned: str
    token: str
    token_id: int


def ensure_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give a tokenizer without a chat template our plain one, to be saved with it; return the template.

    The plain template begins with BOS where the tokenizer puts one before plain text, as the base was
    trained that way.

    Raises:
        DataError: The tokenizer has neither a template nor an EOS token to end an answer with.
    """
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise DataError(
                "A tokenizer without a chat template must have an eos_token to end answers with, got none. "
                "Set tokenizer.eos_token or tokenizer.chat_template."
            )
        tokenizer.chat_template = (_BOS if _puts_bos(tokenizer) else "") + PLAIN_TEMPLATE
    return tokenizer.get_chat_template()


def set_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give a tokenizer the chat template that was chosen.

    Args:
        tokenizer: Of the base.
        choice: `plain` for ours, a file that holds one, or None for the tokenizer's own if it has one.

    Raises:
        DataError: The file cannot be read, or holds nothing.
    """
    if choice == "plain":
        tokenizer.chat_template = None
    elif choice is not None:
        try:
            text = Path(choice).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat_template must be plain or a file of UTF-8 text, got {choice!r}: {error}.") from error
        if not text.strip():
            raise DataError(f"chat_template must be plain or a file that holds a template, {choice} is empty.")
        tokenizer.chat_template = text
    ensure_template(tokenizer)


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("x").input_ids[:1] == [bos]


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a model answers: what training and generation both put before the answer.

    Its ids are `tokenizer(text, add_special_tokens=False)`: the template has set the special tokens already.

    Raises:
        jinja2.TemplateError, or an error of Python from its expressions: The template refuses the messages.
    """
    return render(messages, tokenizer, for_generation=True)


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, for_generation: bool) -> str:
    """Messages as the template writes them, for generation with what stands before the next answer.

    Raises:
        jinja2.TemplateError, or an error of Python from its expressions: The template refuses the messages.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return cast(str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=for_generation))


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer under the tokenizer's chat template.

    Raises:
        DataError: The template cannot render a question and an answer, or nothing ends an answer.
    """
    return find_ending(tokenizer).token_id


def find_ending(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """Ask the template, with a made-up answer, what comes after an answer.

    The end is the first special token there: some templates put more behind the end of the turn.

    Raises:
        DataError: As `end_token_id`.
    """
    turns = [Message(role="user", content="Question"), Message(role="assistant", content=_PROBE)]
    try:
        whole = render(turns, tokenizer, for_generation=False)
    except Exception as error:  # templates raise jinja2's errors, or Python's own from their expressions
        raise DataError(f"The chat template must render a question and an answer, got: {error}.") from error
    before, _, after = whole.rpartition(_PROBE)
    if not before:
        raise DataError(f"The chat template must keep the answer as it is, got {whole[-200:]!r}. Mend it.")
    end = _special_tokens(tokenizer).search(after)
    token = end.group() if end else tokenizer.eos_token
    if token is None:
        raise DataError(
            "An answer must end in a special token, but the chat template writes none and the tokenizer has "
            "no eos_token. Set one of them."
        )
    return Ending(
        text=after,
        learned=after[: end.start()] if end else after.rstrip(),
        token=str(token),
        token_id=cast(int, tokenizer.convert_tokens_to_ids(str(token))),
    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern for every special token, the longest first where one begins another."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts.update(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
