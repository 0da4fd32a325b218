"""Bands learned from levelled texts say the level of others; what they do on real text is in tests/benchmarks."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dylora_moe.config import GenerateConfig
from dylora_moe.errors import ConfigError, DataError
from dylora_moe.generate.asking import Hooks
from dylora_moe.generate.levels import (
    FEATURES,
    MIN_WORDS,
    agreement,
    confusion,
    learn_scale,
    make_measure,
    read_levelled,
    read_word_levels,
    word_frequency,
)
from dylora_moe.generate.run import generate

COMMON = ("casa", "cane", "sole", "mare", "pane", "vino", "mano", "sale")
RARE = ("perspicacia", "inveterato", "ottemperare", "desueto", "recondito", "esiziale", "pedissequo", "sagacia")


def frequency(word: str) -> float:
    return 6.0 if word in COMMON else 2.0


measure = make_measure(frequency)


def text(draw: random.Random, rare: float, words: int = 20) -> str:
    return " ".join(draw.choice(RARE if draw.random() < rare else COMMON) for _ in range(words)) + "."


def texts(shares: dict[str, float], number: int = 12) -> dict[str, list[str]]:
    draw = random.Random(0)
    return {level: [text(draw, rare) for _ in range(number)] for level, rare in shares.items()}


def test_levels_are_told_by_what_levelled_texts_have() -> None:
    scale = learn_scale(texts({"A1": 0.0, "B1": 0.4, "C1": 0.9}), measure)
    draw = random.Random(1)
    for level, rare in (("A1", 0.0), ("B1", 0.4), ("C1", 0.9)):
        found = [scale.level_of(text(draw, rare, 40)) for _ in range(10)]
        assert found.count(level) >= 8
    assert scale.level_of(text(draw, 0.5, MIN_WORDS - 1)) is None
    assert list(scale.cuts) == sorted(scale.cuts) and scale.levels == ("A1", "B1", "C1")


def test_a_level_of_many_texts_counts_as_much_as_one_of_few() -> None:
    many = texts({"easy": 0.0, "hard": 0.8}, 10)
    scale = learn_scale({**many, "easy": many["easy"] * 30}, measure)
    even = learn_scale(many, measure)
    draw = random.Random(2)
    others = [text(draw, share, 30) for share in (0.1, 0.3, 0.5, 0.7) for _ in range(5)]
    same = [scale.level_of(other) == even.level_of(other) for other in others]
    assert sum(same) >= 18


def test_what_is_counted() -> None:
    by_length = make_measure(lambda word: float(len(word)))
    counted = dict(zip(FEATURES, by_length("Il cane mangia. Poi dorme!"), strict=True))
    assert counted["words a sentence"] == 2.5 and counted["letters a word"] == 4.0
    assert counted["gulpease"] == pytest.approx(89 + (300 * 2 - 10 * 20) / 5)
    assert counted["mean frequency"] == 4.0 and counted["words below 4"] == pytest.approx(2 / 5)
    assert np.isfinite(measure("")).all()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "two levels at least, got none"),
        ({"A1": 0.1}, "two levels at least, got A1"),
    ],
)
def test_too_little_to_learn_from(found: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        learn_scale(texts(found), frequency)
    with pytest.raises(DataError, match="5 of each level, of 12 words and more, got 0 of B1"):
        learn_scale(texts({"A1": 0.0}) | {"B1": ["troppo corto"] * 9}, frequency)


def test_agreement_is_cohen_s_weighted_kappa() -> None:
    assert agreement([[3, 0], [0, 4]]) == 1.0 and agreement([[2, 2], [2, 2]]) == 0.0
    draw = random.Random(3)
    asked, found = ([draw.choice("abc") for _ in range(60)] for _ in range(2))
    counts = confusion("abc", asked, found)
    pairs = [("abc".index(one) - "abc".index(other)) ** 2 for one in asked for other in found]
    seen = [("abc".index(one) - "abc".index(other)) ** 2 for one, other in zip(asked, found, strict=True)]
    assert agreement(counts) == pytest.approx(1 - (sum(seen) / 60) / (sum(pairs) / 3600))


def test_answers_far_from_their_level_are_asked_for_anew(
    recipe: Callable[..., GenerateConfig], serve: Callable[..., str], tmp_path: Path
) -> None:
    """The stub writes twelve common words, whatever the level."""
    pytest.importorskip("wordfreq")
    draw = random.Random(4)
    rows = [
        {"text": " ".join(draw.choices([*COMMON, "il", "la", "bene", "sempre"], k=14)) + ".", "level": "A1"}
        for _ in range(8)
    ]
    rows += [{"text": " ".join(draw.choices(RARE, k=14)) + ".", "level": "C2"} for _ in range(8)]
    path = tmp_path / "levelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = recipe(levelled_text=str(path), endpoints=[serve()], levels={"A1": 6, "C2": 5}, max_regenerations=1)
    result = generate(config, Hooks())
    assert {name: level["passed"] for name, level in result["levels"].items()} == {"A1": 6, "C2": 0}
    assert result["set_aside"] == {"level": 5} and result["levels_found"]["rows"] == 6
    later = config.model_copy(update={"levelled_text": None, "run_name": "later"})
    assert generate(later, Hooks())["rows"]["passed"] == 11
    scaled = later.model_copy(update={"levelled_text": str(path), "max_regenerations": 0})
    assert generate(scaled, Hooks())["set_aside"] == {"level": 5}  # what passed before there was a scale
    assert "weighted kappa" in (config.run_dir / "report.html").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: .* a level among A1, A2, B1, B2, C1, C2, got level 'X'"):
        path.write_text(json.dumps({"text": "a", "level": "X"}), encoding="utf-8")
        read_levelled(path, ["A1", "A2", "B1", "B2", "C1", "C2"])
    with pytest.raises(ConfigError, match="texts of every level that rows are asked for, got none of B2"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        generate(config.model_copy(update={"levels": {"A1": 5, "B2": 5}, "run_name": "other"}), Hooks())
    with pytest.raises(ConfigError, match="whose words were counted, got None"):
        word_frequency(None)


def test_a_list_of_words_tells_the_level_where_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    rows = [{"word": f"{word}, {word}i", "cefr": "A1"} for word in COMMON] + [{"word": "senza livello", "cefr": None}]
    rows += [{"word": word, "cefr": "C1"} for word in RARE] + [{"word": RARE[0], "cefr": "B1"}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    listed = read_word_levels(path, ["A1", "B1", "C1"])
    assert listed["casai"] == 0 and listed[RARE[0]] == 1 and listed[RARE[1]] == 2 and "senza" not in listed
    draw = random.Random(3)
    halves = {"A1": COMMON[:4], "C1": COMMON[4:]}  # words of one length, none rarer than another

    def examples() -> dict[str, list[str]]:
        return {level: [" ".join(draw.choices(half, k=20)) for _ in range(12)] for level, half in halves.items()}

    known = {word: 2 * (word in halves["C1"]) for word in COMMON}
    learned, judged = examples(), [(level, each) for level, found in examples().items() for each in found]
    blind, knowing = (learn_scale(learned, make_measure(lambda word: 3.0, words)) for words in (None, known))
    assert sum(knowing.level_of(each) == level for level, each in judged) == 24
    assert sum(blind.level_of(each) == level for level, each in judged) < 18
    path.write_text(json.dumps([{"word": "casa", "level": "X"}]), encoding="utf-8")
    with pytest.raises(DataError, match="a level among A1, B1, C1, or none, got level 'X'"):
        read_word_levels(path, ["A1", "B1", "C1"])
    path.write_text(json.dumps([{"word": "casa", "level": None}]), encoding="utf-8")
    with pytest.raises(DataError, match="must have words with levels, got none"):
        read_word_levels(path, ["A1"])
