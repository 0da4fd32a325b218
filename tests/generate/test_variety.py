"""Figures of variety against slow and obvious ones."""

import math
import random
from collections import Counter

import pytest

from dylora_moe.generate.variety import distinct, self_bleu


def runs(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def slow_self_bleu(answers: list[str]) -> float:
    """Each answer against every other, as BLEU is written down."""
    split = [answer.lower().split() for answer in answers]
    scores = []
    for place, words in enumerate(split):
        others = split[:place] + split[place + 1 :]
        precision = 1.0
        for n in range(1, 5):
            own = runs(words, n)
            shared = sum(min(count, max(runs(other, n)[run] for other in others)) for run, count in own.items())
            precision *= ((shared or 0.1) / max(1, sum(own.values()))) ** 0.25
        nearest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        scores.append(precision * (1.0 if len(words) >= nearest else math.exp(1 - nearest / len(words))))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(30))
def test_self_bleu_is_that_of_all_pairs(seed: int) -> None:
    draw = random.Random(seed)
    answers = [
        " ".join(draw.choices("abcdef"[: draw.randint(1, 6)], k=draw.randint(1, 12))) for _ in range(draw.randint(2, 9))
    ]
    assert self_bleu(answers) == pytest.approx(slow_self_bleu(answers), rel=1e-12)


def test_copies_are_not_varied_and_other_words_are() -> None:
    words = [f"w{number}" for number in range(400)]
    own = [" ".join(words[at : at + 20]) for at in range(0, 400, 20)]
    assert self_bleu([own[0]] * 5) == pytest.approx(1.0) and self_bleu(own) < 0.02
    assert self_bleu([]) == self_bleu(["one"]) == self_bleu(["one", ""]) == 0.0


def test_distinct_is_the_share_of_different_runs() -> None:
    assert distinct(["a b a", "A b"], 1) == 2 / 5 and distinct(["a b a", "a b"], 2) == 2 / 3
    assert distinct([], 1) == distinct(["a"], 2) == 0.0
