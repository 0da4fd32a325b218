"""Answers cut from patterns are found, those that people wrote are not, whatever the questions are about."""

import random

from dylora_moe.generate.review import near_copies, review
from dylora_moe.generate.skeletons import find_skeletons, most_common

NAMES = ("Anna", "Bruno", "Carla", "Dario", "Elena", "Franco", "Gina", "Hugo", "Irene", "Luca", "Marta", "Nino", "Olga")
THINGS = (
    "casa",
    "libro",
    "gatto",
    "cane",
    "tavolo",
    "penna",
    "porta",
    "mare",
    "sole",
    "luna",
    "albero",
    "fiore",
    "nave",
)
PATTERNS = (
    "Ottima domanda! {a}",
    "Questo testo di livello {level} mostra una buona padronanza di {a}",
    "In italiano, la parola {b} significa {c} e si usa spesso con {a}",
)


def free(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(NAMES if at % 2 else THINGS) for at in range(words))


def test_openings_endings_and_frames_are_found() -> None:
    draw = random.Random(0)
    own = [free(draw, 12) for _ in range(80)]
    cut = [
        PATTERNS[place % 3].format(a=free(draw, 8), b=free(draw, 1), c=free(draw, 2), level="B1") for place in range(30)
    ]
    found = find_skeletons(["?"] * 110, own + cut)
    assert found[:80] == [None] * 80 and None not in found[80:]
    commonest = most_common(found, 3)
    assert [each.answers for each in commonest] == [10, 10, 10]
    assert {each.text for each in commonest} == {
        "ottima domanda ...",
        "questo testo di livello ...",
        "in italiano la parola ...",
    }


def test_words_of_the_question_are_no_pattern() -> None:
    """Twenty lessons about the same phrase, of their own words else."""
    draw = random.Random(0)
    answers = [f"si dice davanti alla casa {free(draw, 5)}" for _ in range(20)]
    assert find_skeletons(["Come si dice davanti alla casa?"] * 20, answers) == [None] * 20
    assert None not in find_skeletons(["Che cosa?"] * 20, answers)


def test_few_answers_alike_are_no_pattern() -> None:
    draw = random.Random(0)
    answers = [f"Ottima domanda {free(draw, 8)}" for _ in range(7)] + [free(draw, 9) for _ in range(40)]
    assert find_skeletons(["?"] * 47, answers) == [None] * 47


def test_the_second_of_two_near_copies_is_one() -> None:
    draw = random.Random(1)
    first, other = free(draw, 20), free(draw, 20)
    assert near_copies([first, other, first.upper(), f"{first} Bruno", "si dice casa", "si dice casa"]) == [2, 3]
    assert near_copies([]) == near_copies([first]) == []
    assert review(["?"] * 3, [first, other, first]) == [[], [], ["near_copy"]]
