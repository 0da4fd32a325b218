"""Near-copies are found, a shared template is no copy, and the index finds what comparing all pairs finds."""

import io
import random
import tracemalloc
from tempfile import TemporaryFile

import numpy as np
import pytest

from dylora_moe.data.similarity import SimilarTexts, shingles

WORDS = [f"word{number}" for number in range(400)]


def index_of(texts):
    return SimilarTexts(lambda place: (texts[place],), len(texts), io.BytesIO())


def earlier(texts, *, threshold=0.8):
    index, everything = index_of(texts), np.ones(len(texts), dtype=np.bool_)
    found = [index.find_earlier(place, threshold=threshold, allowed=everything) for place in range(len(texts))]
    return [None if pair is None else pair[0] for pair in found]


def text_of(seed, length=40):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def test_similarity_is_the_share_of_common_runs_of_three_words():
    first, second = "a b c d e f", "a b c d e x"
    assert len(shingles(first)) == 4
    assert index_of([first, second]).similarity(0, 1) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Name three colours", "name  three\ncolours."),
        ("Sort it", "SORT IT!"),
        ("What does it mean, and why?", "what does it mean and why"),
        ("Nenne drei Stra\u00dfen", "nenne drei STRASSEN"),
    ],
)
def test_case_spaces_and_punctuation_do_not_count(one, other):
    assert earlier([one, other]) == [None, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 + 3?", "What is 2 * 3?"),
        ("x < y", "x > y"),
        (";", "."),
        ("\u4f60\u597d\u5417", "\u4f60\u4e0d\u597d"),
    ],
)
def test_symbols_and_characters_of_scripts_without_spaces_count(one, other):
    assert earlier([one, other]) == [None, None]


def test_one_changed_word_in_a_long_text_is_found_and_a_fifth_of_them_is_not():
    words = text_of(1, 60).split()
    near, far = list(words), list(words)
    near[30] = "another"
    for place in range(0, 60, 5):
        far[place] = "another"
    assert earlier([" ".join(words), " ".join(near), " ".join(far)]) == [None, 0, None]


def test_the_index_finds_what_comparing_all_pairs_finds():
    draw = random.Random(4)
    texts = []
    for number in range(150):
        words = text_of(number, draw.randint(15, 60)).split()
        texts.append(" ".join(words))
        for _ in range(draw.randint(0, 2)):
            changed = list(words)
            for _ in range(draw.randint(1, 5)):
                changed[draw.randrange(len(changed))] = draw.choice(WORDS)
            texts.append(" ".join(changed))
    draw.shuffle(texts)
    index = index_of(texts)
    wanted = {
        place for place in range(len(texts)) if any(index.similarity(place, other) >= 0.8 for other in range(place))
    }
    found = {place for place, other in enumerate(earlier(texts)) if other is not None}
    assert len(wanted) > 20
    assert found <= wanted and len(wanted - found) <= 0.02 * len(wanted)


def test_a_template_that_many_texts_share_makes_no_copies():
    template = " ".join(WORDS[:60])
    texts = [f"{template} {text_of(number, 4)}" for number in range(40)]
    assert earlier(texts) == [None] * 40
    assert index_of(texts).similarity(0, 1) < 0.2
    assert earlier([*texts, texts[3] + "!"])[-1] == 3


def test_equal_rare_words_alone_make_no_copies():
    """With what many texts share left out, little may be left of a text."""
    common = [" ".join(WORDS[start : start + 30]) for start in (0, 100) for _ in range(20)]
    first, second = (f"{text} one two rare words" for text in (common[0], common[20]))
    index = index_of([*common, first, second])
    assert index.similarity(40, 41) < 0.2


def test_every_part_must_be_similar():
    pairs = [(text_of(0), text_of(1)), (text_of(0), text_of(2)), (text_of(0) + " more", text_of(1) + " more")]
    index = SimilarTexts(lambda place: pairs[place], 3, io.BytesIO())
    everything = np.ones(3, dtype=np.bool_)
    assert index.similarity(0, 1) == 0
    assert index.find_earlier(1, threshold=0.8, allowed=everything) is None
    found = index.find_earlier(2, threshold=0.8, allowed=everything)
    assert found is not None and found[0] == 0


def test_only_allowed_texts_are_found():
    texts = [text_of(0), text_of(0), text_of(0)]
    assert index_of(texts).find_earlier(2, threshold=0.8, allowed=np.array([False, True, True])) == (1, 1.0)


def test_among_many_copies_each_is_found():
    groups, size = 100, 20
    texts = [f"{text_of(number % groups)} {number}" for number in range(groups * size)]
    found = earlier(texts)
    assert found[:groups] == [None] * groups
    assert [other % groups for other in found[groups:]] == [place % groups for place in range(groups, groups * size)]


def test_memory_does_not_grow_with_copies():
    """Texts with fourteen copies each take no more than others: what is found is not kept."""

    def peak(groups):
        texts = [f"{text_of(number % groups)} {number}" for number in range(1500)]
        tracemalloc.start()
        try:
            with TemporaryFile() as file:
                index = SimilarTexts(lambda place: (texts[place],), len(texts), file)
                stays = np.ones(len(texts), dtype=np.bool_)
                for place in range(len(texts)):
                    stays[place] = index.find_earlier(place, threshold=0.8, allowed=stays) is None
            return tracemalloc.get_traced_memory()[1], int(stays.sum())
        finally:
            tracemalloc.stop()

    (without, all_stay), (with_copies, few_stay) = peak(1500), peak(100)
    assert all_stay == 1500 and few_stay == 100
    assert with_copies < 1.2 * without


def test_no_texts_and_texts_without_words_are_no_problem():
    assert earlier([]) == []
    assert earlier(["", "\U0001f600", "x", ""]) == [None, None, None, 0]


def test_a_text_of_any_length_is_signed():
    long = text_of(0, 20_000)
    assert earlier([long, long + " end"]) == [None, 0]
