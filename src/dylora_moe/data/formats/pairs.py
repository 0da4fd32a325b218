"""Rows that are one prompt and one answer: alpaca, evol, prompt/completion, GSM8K, MBPP, and plain text."""

from dylora_moe.data.formats.fields import Conversation, Row, first_field, list_field, text_field, turns


def read_alpaca(row: Row, where: str) -> tuple[Conversation, ...]:
    """`instruction`, optional `input`, `output` (or `response`); evol has no `input`."""
    prompt = text_field(row, "instruction", where, meaning="the prompt")
    if row.get("input") not in (None, ""):
        extra = row["input"]
        # A blank input is common in the wild and means "no input"; other types are a mistake.
        if not isinstance(extra, str) or extra.strip():
            prompt = f"{prompt}\n\n{text_field(row, 'input', where, meaning='the input to the prompt')}"
    field = first_field(row, "output", "response")
    return (turns(prompt, text_field(row, field, where, meaning="the answer")),)


def read_prompt_completion(row: Row, where: str) -> tuple[Conversation, ...]:
    """`prompt`, `completion` (or `answer`)."""
    prompt = text_field(row, "prompt", where, meaning="the prompt")
    field = first_field(row, "completion", "answer")
    return (turns(prompt, text_field(row, field, where, meaning="the answer")),)


def read_gsm8k(row: Row, where: str) -> tuple[Conversation, ...]:
    """`question`, `answer`."""
    prompt = text_field(row, "question", where, meaning="the prompt")
    return (turns(prompt, text_field(row, "answer", where, meaning="the answer")),)


def read_mbpp(row: Row, where: str) -> tuple[Conversation, ...]:
    """`text` (or `prompt`), `code`, optional `test_list`.

    Source: the prompt of the MBPP paper, https://arxiv.org/abs/2108.07732, section 2.1 and figure 1.
    """
    prompt = text_field(row, first_field(row, "text", "prompt"), where, meaning="the task")
    if row.get("test_list") is not None:
        lines = "\n".join(map(str, list_field(row, "test_list", where, of="assert lines")))
        prompt = f"{prompt} Your code should pass these tests:\n\n{lines}" if lines else prompt
    code = text_field(row, "code", where, meaning="the answer")
    # 972 of the 974 rows as published have Windows line ends, which a model would learn to write.
    return (turns(prompt.replace("\r\n", "\n"), code.replace("\r\n", "\n")),)


def read_text(row: Row, where: str) -> tuple[Conversation, ...]:
    """`text` that is no answer to anything: all of it is learned, after an empty prompt."""
    return (turns("", text_field(row, "text", where, meaning="the text")),)
