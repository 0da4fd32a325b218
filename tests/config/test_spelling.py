"""Spelling: distances of words, the nearest of many found without measuring all of them."""

import random

import pytest

from dylora_moe.config import RunConfig
from dylora_moe.config.spelling import did_you_mean, edit_distance, nearest

SETTINGS = list(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abc", "xbc", 1),
        ("seed", "sed", 1),
        ("kitten", "sitting", 3),
        ("ab", "ba", 1),
        ("abcd", "badc", 2),
        ("ca", "abc", 3),  # 2 where a letter may come between swapped ones
    ],
)
def test_the_distance_of_two_texts(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_skipping_words_by_their_letters_changes_no_answer() -> None:
    draw = random.Random(1)
    for name in draw.sample(SETTINGS, 12):
        for place in range(len(name)):
            word = name[:place] + draw.choice("aeos_") + name[place + draw.randrange(2) :]
            distances = {known: edit_distance(word, known) for known in SETTINGS}
            best = min(distances.values())
            assert set(nearest(word, SETTINGS)) == {known for known in SETTINGS if distances[known] == best}


def test_at_most_two_names_are_offered() -> None:
    assert did_you_mean([]) == "" and did_you_mean(["a"]) == "Did you mean a?"
    assert did_you_mean(["a", "b", "c"]) == "Did you mean a or b?"
