"""What only shows beside other answers: near copies, and answers cut from one pattern."""

import tempfile
from collections.abc import Sequence

import numpy as np

from dylora_moe.data.similarity import SimilarTexts
from dylora_moe.generate.skeletons import find_skeletons

# Jaccard similarity of runs of three words. Answers are shorter than training rows (data/cleaning.py): with a word in
# thirty exchanged, at 0.8 three copies of five are found, at 0.7 nine of ten (benchmarks/checks.py).
_NEAR_COPY = 0.7
# Under so many words two right answers to like questions are the same by nature: "Si dice casa."
_LEAST_WORDS = 8


def review(questions: Sequence[str], answers: Sequence[str]) -> list[list[str]]:
    """Codes of what is wrong with each answer beside the others, none where nothing is.

    Args:
        questions: Of each answer, with all that was said before it.
        answers: In their order: of two near copies the second is one.
    """
    found: list[list[str]] = [[] for _ in answers]
    for place in near_copies(answers):
        found[place].append("near_copy")
    for place, skeleton in enumerate(find_skeletons(questions, answers)):
        if skeleton is not None:
            found[place].append("template")
    return found


def near_copies(answers: Sequence[str]) -> list[int]:
    """Places of answers that are nearly the same as an earlier one that is no copy itself."""
    allowed = np.array([len(answer.split()) >= _LEAST_WORDS for answer in answers], np.bool_)
    copies, seen = list[int](), dict[str, int]()
    with tempfile.TemporaryFile() as file:
        index = SimilarTexts(lambda place: (answers[place],), len(answers), file) if len(answers) > 1 else None
        for place, answer in enumerate(answers):
            if not allowed[place]:
                continue
            plain = " ".join(answer.lower().split())
            if plain in seen or (index and index.find_earlier(place, threshold=_NEAR_COPY, allowed=allowed)):
                copies.append(place)
                allowed[place] = False
            seen.setdefault(plain, place)
    return copies
