"""What an answer must be by itself: there, whole, in its language, no echo of the question, no refusal.

Each check gives a code, so that counts can be compared; `REASONS` says it in words, for people and for the generator.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from dylora_moe.generate.clients import Reply
from dylora_moe.generate.questions import MARKS, Question

REASONS: Mapping[str, str] = {
    "empty": "it held no words.",
    "cut_off": "it was too long and was cut off.",
    "repeats_question": "it repeated the question.",
    "refusal": "it refused to answer.",
    "language": "it was in another language.",
    "marks": "it held marks of a chat template.",
    "near_copy": "it was nearly the same as another answer.",
    "template": "it used a phrase that many answers begin or go on with.",
    "level": "it was harder or easier than asked for.",
}
"""Code -> why an answer does not pass, as a sentence that follows "since"."""

# Letters under which a language cannot be told: Tatoeba's sentences, Italian against English (docs/log.md).
_LEAST_LETTERS = 20
_LEAST_ECHO_WORDS = 5
# Of the question's words, those that an echo has; of its own, those that it may add.
_SAID, _ADDED = 0.8, 0.1
# In the first words only: later on it may be the subject of a lesson.
_REFUSAL_CHARS = 160
_DO = r"(?:help|assist|answer|provide|fulfil|comply|respond|do (?:this|that))"
_REFUSAL = re.compile(
    r"as an? (?:ai\b|(?:large )?language model)|i(?:'m| am) (?:just )?an ai\b"
    rf"|\bi (?:can'?t|cannot|can not|won'?t) {_DO}|\bi(?:'m| am) (?:unable|not able) to {_DO}"
    r"|\bsorry,? (?:but )?i(?:'m| am)? (?:can'?t|cannot|unable|not able)"
    r"|\bi must (?:decline|refuse)|not appropriate for me"
    r"|(?:in quanto|come) (?:ia\b|intelligenza artificiale|modello linguistico)"
    r"|sono (?:solo )?un modello (?:linguistico|di linguaggio)|(?:mi dispiace|spiacente),? (?:ma )?non posso"
    r"|\bnon (?:posso|sono in grado di) (?:aiutarti|rispondere|fornire)",
    re.IGNORECASE,
)
_THINKING = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
_WORD = re.compile(r"\w+")


def check_answer(reply: Reply, question: Question, language: str | None) -> list[str]:
    """Codes of what is wrong with an answer, none where it may pass.

    Args:
        reply: The answer.
        question: That it answers.
        language: ISO 639-1 code that it must be in; None for any.
    """
    words = _WORD.findall(reply.text.lower())
    if not any(char.isalpha() for char in reply.text):
        return ["empty"]
    found = [] if reply.is_whole else ["cut_off"]
    if echoes(words, _WORD.findall(question.text.lower())):
        found.append("repeats_question")
    if _REFUSAL.search(reply.text[:_REFUSAL_CHARS].replace("\u2019", "'")):
        found.append("refusal")
    if MARKS.search(reply.text) or _THINKING.search(reply.text):
        found.append("marks")
    if language and not is_in(reply.text, language):
        found.append("language")
    return found


def echoes(answer: Sequence[str], question: Sequence[str]) -> bool:
    """Whether an answer begins with the question, or says nearly all of it and hardly a word more. In lower case.

    An answer out of a text that stands in the question says little of the question; one that adds the word that was
    asked for says more.
    """
    if len(question) < _LEAST_ECHO_WORDS:
        return False
    if list(answer[: len(question)]) == list(question):
        return True
    both = (Counter(answer) & Counter(question)).total()
    return both > _SAID * len(question) and len(answer) - both <= _ADDED * len(answer)


def is_in(text: str, language: str) -> bool:
    """Whether a text is in a language, or too short to tell."""
    letters = sum(char.isalpha() for char in text)
    return letters < _LEAST_LETTERS or _language(text) == language


def known_languages() -> frozenset[str]:
    """ISO 639-1 codes of those that can be told."""
    from py3langid import rank

    return frozenset(str(code) for code, _ in rank("a"))


@lru_cache(maxsize=4096)
def _language(text: str) -> str:
    from py3langid import classify  # its model takes a second and 100 MB

    return str(classify(text)[0])
