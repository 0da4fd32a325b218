"""How varied answers are: the share of runs of words that are different, and how much of an answer others say, too."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

_MOST_WORDS = 4
# What a run of words that no other answer has counts as, so that one length without any does not make the whole 0;
# Chen and Cherry, A Systematic Comparison of Smoothing Techniques for Sentence-Level BLEU, 2014, method 1.
_NONE_SHARED = 0.1

_Words = list[str]


def distinct(answers: Sequence[str], n: int) -> float:
    """Share of runs of n words that are different from each other, 0 to 1; higher is more varied.

    Source: Li and others, A Diversity-Promoting Objective Function for Neural Conversation Models, 2016.
    """
    found: Counter[tuple[str, ...]] = Counter()
    for words in map(_split, answers):
        found.update(_runs(words, n))
    return len(found) / found.total() if found else 0.0


def self_bleu(answers: Sequence[str]) -> float:
    """Mean BLEU of runs of up to four words of each answer against all others, 0 to 1; lower is more varied.

    Exact over all pairs in time proportional to the words: of each run the two answers that have it most often bound
    what an answer can share with any other.

    Source: Zhu and others, Texygen: A Benchmarking Platform for Text Generation Models, 2018.
    """
    split = [words for words in map(_split, answers) if words]
    if len(split) < 2:
        return 0.0
    precisions = [0.0] * len(split)
    for n in range(1, _MOST_WORDS + 1):
        counts = [Counter(_runs(words, n)) for words in split]
        most: dict[tuple[str, ...], tuple[int, int, int]] = {}  # run -> most often, in which answer, most in any other
        for place, found in enumerate(counts):
            for run, number in found.items():
                first, where, second = most.get(run, (0, -1, 0))
                most[run] = (number, place, first) if number > first else (first, where, max(second, number))
        for place, found in enumerate(counts):
            shared = sum(
                min(number, most[run][2] if most[run][1] == place else most[run][0]) for run, number in found.items()
            )
            precisions[place] += math.log((shared or _NONE_SHARED) / max(1, found.total())) / _MOST_WORDS
    lengths = sorted(map(len, split))
    return sum(
        math.exp(precision) * _brevity(len(words), lengths) for precision, words in zip(precisions, split, strict=True)
    ) / len(split)


def _brevity(length: int, lengths: Sequence[int]) -> float:
    """BLEU's penalty of an answer that is shorter than the other one nearest to it in length.

    Args:
        length: Of the answer, in words.
        lengths: Of all answers, ascending, its own among them.
    """
    at = bisect_left(lengths, length)
    others = [lengths[place] for place in (at - 1, at + 1) if 0 <= place < len(lengths)]
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length >= nearest else math.exp(1 - nearest / length)


def _split(answer: str) -> _Words:
    return answer.lower().split()


def _runs(words: _Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
