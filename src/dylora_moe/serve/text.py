"""Tokens of an answer -> its text, piece by piece: no half character, nothing of a stop string."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what stands for bytes that are no whole character
_MOST_HALVES = 3  # a character has at most four bytes

T = TypeVar("T")


class TextStream:
    """The text of one answer as its tokens come; all of it together is the text of all tokens together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # The last tokens, since one alone may lose its space: `_settled` of them whose text was given in whole, and
        # those after. Of the text of all `_shown` characters were given.
        self._ids: list[int] = []
        self._settled = self._shown = 0

    def add(self, token_id: int) -> str:
        """The text that is certain with one more token."""
        self._ids.append(token_id)
        text = self._text()
        halves = len(text) - len(text.rstrip(_HALF))
        end = len(text) - min(halves, _MOST_HALVES)
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        if text and not halves:
            self._ids = self._ids[self._settled :]
            self._settled = len(self._ids)
            self._shown = len(self._text())
        return new

    def rest(self) -> str:
        """What is left at the end, half characters as replacement characters."""
        new = self._text()[self._shown :]
        self._shown += len(new)
        return new

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings(Generic[T]):
    """Holds tokens back while their text may be the beginning of a stop string, and cuts where one is found."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held: list[tuple[T, str]] = []

    def add(self, token: T, text: str) -> tuple[list[tuple[T, str]], bool]:
        """One more token and its text -> tokens that can be given with their texts, and whether a stop was found."""
        self._held.append((token, text))
        whole = "".join(text for _, text in self._held)
        if found := [at for string in self._strings if (at := whole.find(string)) >= 0]:
            return self._cut(min(found)), True
        end = len(whole) - max((_overlap(whole, string) for string in self._strings), default=0)
        free, length = 0, 0
        for _, text in self._held:
            length += len(text)
            if length > end:
                break
            free += 1
        given, self._held = self._held[:free], self._held[free:]
        return given, False

    def rest(self) -> list[tuple[T, str]]:
        """What is left at the end."""
        given, self._held = self._held, []
        return given

    def _cut(self, length: int) -> list[tuple[T, str]]:
        given = []
        for token, text in self.rest():
            given.append((token, text[:length]))
            length -= len(given[-1][1])
        return given


def _overlap(text: str, string: str) -> int:
    """Characters at the end of a text with which the string begins."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
