"""Near-copies are found, a shared template is no copy, and the index finds what comparing all pairs finds."""

import random

import pytest

from dylora_moe.data.similarity import SimilarTexts, shingles

WORDS = [f"word{number}" for number in range(400)]


def index_of(texts):
    return SimilarTexts(lambda place: (texts[place],), len(texts))


def earlier(texts, *, threshold=0.8):
    """For each text the most similar one before it."""
    index, found = index_of(texts), [None] * len(texts)
    for place, others in index.candidates(threshold=threshold):
        if pair := index.most_similar(place, others, threshold=threshold):
            found[place] = pair[0]
    return found


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
    index = SimilarTexts(lambda place: pairs[place], 3)
    assert index.similarity(0, 1) == 0
    assert list(index.candidates(threshold=0.8)) == [(2, [0])]
    found = index.most_similar(2, [0, 1], threshold=0.8)
    assert found == (0, index.similarity(0, 2)) and found[1] > 0.9


def test_texts_may_be_compared_with_the_first_ones_alone():
    texts = [text_of(0), text_of(1), text_of(1), text_of(0), text_of(1)]
    assert list(index_of(texts).candidates(threshold=0.8)) == [(2, [1]), (3, [0]), (4, [1, 2])]
    assert list(index_of(texts).candidates(threshold=0.8, among_first=2)) == [(2, [1]), (3, [0]), (4, [1])]


def test_the_most_similar_is_the_first_of_equals_or_none():
    words = text_of(0).split()
    texts = [" ".join(words), " ".join([*words[:-1], "x"]), " ".join([*words[:-1], "x"]), " ".join(words), text_of(1)]
    index = index_of(texts)
    assert index.most_similar(2, [0, 1], threshold=0.8) == (1, 1.0)
    assert index.most_similar(3, [0, 1, 2], threshold=0.8) == (0, 1.0)
    assert index.most_similar(4, [0, 1], threshold=0.8) is None and index.most_similar(0, [], threshold=0.8) is None


def test_of_very_many_copies_each_is_found(tmp_path):
    """And nothing stays in the scratch folder."""
    groups, size = 120, 25
    texts = [f"{text_of(number % groups)} {number}" for number in range(groups * size)]
    pairs = list(index_of(texts).candidates(threshold=0.8, scratch=tmp_path))
    assert [text for text, _ in pairs] == list(range(groups, groups * size))
    assert all(others[0] == text % groups for text, others in pairs)
    assert list(tmp_path.iterdir()) == []


def test_no_texts_and_texts_without_words_are_no_problem():
    assert earlier([]) == []
    assert earlier(["", "\U0001f600", "x", ""]) == [None, None, None, 0]


def test_a_text_of_any_length_is_signed():
    long = text_of(0, 20_000)
    assert earlier([long, long + " end"]) == [None, 0]
