"""General English text that every machine has without a network: what Python's standard library says of itself.

A model that forgets its English while it learns skills shows it here. The text is that of the running Python, so
losses can be compared within one Python version only.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.tokenize import IGNORED, UNLEARNED_START
from dylora_moe.errors import DataError

# Written in Python, on every platform, the same in every build, and without effects when imported.
MODULES = (
    "abc", "argparse", "ast", "asyncio", "base64", "bisect", "calendar", "cmd", "codecs", "collections", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "doctest", "email.message",
    "email.policy", "enum", "fractions", "functools", "getopt", "gettext", "hashlib", "heapq", "http.client",
    "http.cookiejar", "http.server", "imaplib", "inspect", "ipaddress", "json", "logging", "mailbox", "mimetypes",
    "numbers", "optparse", "pathlib", "pickletools", "pprint", "random", "sched", "shelve", "shlex", "shutil",
    "smtplib", "socketserver", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "timeit", "tokenize", "traceback", "types", "unittest", "urllib.parse", "urllib.request", "uuid",
    "warnings", "weakref", "zipfile",
)  # fmt: skip


def general_rows(tokenizer: PreTrainedTokenizerBase, *, tokens: int = 128, rows: int = 32) -> list[TokenizedRow]:
    """Rows of running prose, from all of the text in even steps.

    Every token is labelled but the first 16, by which a row is routed.

    Args:
        tokenizer: Of the base; the rows begin with BOS where it puts one before plain text.
        tokens: Length of every row.
        rows: How many.

    Raises:
        DataError: Rows too short to hold a label, more of them than there is text, or a Python without docstrings.
    """
    if tokens <= UNLEARNED_START or rows < 1:
        raise DataError(
            f"rows of general text must have more than {UNLEARNED_START} tokens, and there must be at least 1, got "
            f"tokens={tokens} and rows={rows}. Raise them."
        )
    bos = tokenizer.bos_token_id
    start = (bos,) if isinstance(bos, int) and tokenizer("x")["input_ids"][:1] == [bos] else ()
    ids = tuple(tokenizer("\n\n".join(general_paragraphs()), add_special_tokens=False)["input_ids"])
    length = tokens - len(start)
    num_there = len(ids) // length
    if num_there < rows:
        raise DataError(
            f"{rows} rows of general text of {tokens} tokens must fit into the docstrings of Python's library, got "
            f"{len(ids)} tokens of them (Python's option -OO leaves none). Ask for fewer."
        )
    places = [index * num_there // rows * length for index in range(rows)]
    return [_row(start + ids[place : place + length]) for place in places]


def _row(ids: tuple[int, ...]) -> TokenizedRow:
    labels = (*[IGNORED] * UNLEARNED_START, *ids[UNLEARNED_START:])
    return TokenizedRow(input_ids=ids, labels=labels, domain=0)


def general_paragraphs() -> list[str]:
    """The prose of the docstrings, each paragraph once and on one line, in an order that nothing but `MODULES` sets."""
    texts = (text for name in MODULES for text in _docstrings(importlib.import_module(name)))
    paragraphs = (" ".join(part.split()) for text in texts for part in text.split("\n\n") if _is_prose(part))
    return list(dict.fromkeys(paragraphs))


def _docstrings(module: ModuleType) -> Iterator[str]:
    """Of a module, then of its own public classes and functions and of the classes' own public methods, by name."""
    things: list[object] = [module]
    for _, thing in sorted(vars(module).items()):
        if not _is_public(thing, module.__name__):
            continue
        things.append(thing)
        if inspect.isclass(thing):
            things += [part for _, part in sorted(vars(thing).items()) if _is_public(part, module.__name__)]
    for thing in things:
        if text := inspect.getdoc(thing):
            yield text


def _is_public(thing: object, module: str) -> bool:
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        return False
    return thing.__module__.partition(".")[0] == module.partition(".")[0] and not thing.__name__.startswith("_")


def _is_prose(paragraph: str) -> bool:
    """Whole sentences of at least 12 words: no code, list, table, signature or heading."""
    words = paragraph.split()
    if len(words) < 12 or any(line[:1].isspace() for line in paragraph.splitlines()):
        return False
    plain = sum(re.fullmatch(r"[(\"'`]?[A-Za-z][a-z'-]*[a-z)\"'`]?[.,;:!?]?", word) is not None for word in words)
    return paragraph[0].isupper() and words[-1].endswith((".", ":")) and plain >= 0.8 * len(words)
