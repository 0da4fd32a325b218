"""Bands learned from levelled texts say the level of others; on real text they agree with a word list's levels."""

import json
import random
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from dylora_moe.config import GenerateConfig
from dylora_moe.errors import ConfigError, DataError
from dylora_moe.generate import levels
from dylora_moe.generate.levels import (
    MIN_WORDS,
    agreement,
    confusion,
    learn_scale,
    measure,
    read_levelled,
    word_frequency,
)
from dylora_moe.generate.run import Hooks, generate

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
COMMON = ("casa", "cane", "sole", "mare", "pane", "vino", "mano", "sale")
RARE = ("perspicacia", "inveterato", "ottemperare", "desueto", "recondito", "esiziale", "pedissequo", "sagacia")


def frequency(word: str) -> float:
    return 6.0 if word in COMMON else 2.0


def text(draw: random.Random, rare: float, words: int = 20) -> str:
    return " ".join(draw.choice(RARE if draw.random() < rare else COMMON) for _ in range(words)) + "."


def texts(shares: dict[str, float], number: int = 12) -> dict[str, list[str]]:
    draw = random.Random(0)
    return {level: [text(draw, rare) for _ in range(number)] for level, rare in shares.items()}


def test_levels_are_told_by_what_levelled_texts_have() -> None:
    scale = learn_scale(texts({"A1": 0.0, "B1": 0.4, "C1": 0.9}), frequency)
    draw = random.Random(1)
    for level, rare in (("A1", 0.0), ("B1", 0.4), ("C1", 0.9)):
        found = [scale.level_of(text(draw, rare, 40), frequency) for _ in range(10)]
        assert found.count(level) >= 8
    assert scale.level_of(text(draw, 0.5, MIN_WORDS - 1), frequency) is None
    assert list(scale.cuts) == sorted(scale.cuts) and scale.levels == ("A1", "B1", "C1")


def test_a_level_of_many_texts_counts_as_much_as_one_of_few() -> None:
    many = texts({"easy": 0.0, "hard": 0.8}, 10)
    scale = learn_scale({**many, "easy": many["easy"] * 30}, frequency)
    even = learn_scale(many, frequency)
    draw = random.Random(2)
    others = [text(draw, share, 30) for share in (0.1, 0.3, 0.5, 0.7) for _ in range(5)]
    same = [scale.level_of(other, frequency) == even.level_of(other, frequency) for other in others]
    assert sum(same) >= 18


def test_what_is_counted() -> None:
    counted = dict(
        zip(levels.FEATURES, measure("Il cane mangia. Poi dorme!", lambda word: float(len(word))), strict=True)
    )
    assert counted["words a sentence"] == 2.5 and counted["letters a word"] == 4.0
    assert counted["gulpease"] == pytest.approx(89 + (300 * 2 - 10 * 20) / 5)
    assert counted["mean frequency"] == 4.0 and counted["words below 4"] == pytest.approx(2 / 5)
    assert np.isfinite(measure("", frequency)).all()


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
    assert "weighted kappa" in (config.run_dir / "report.html").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: .* a level among A1, A2, B1, B2, C1, C2, got level 'X'"):
        path.write_text(json.dumps({"text": "a", "level": "X"}), encoding="utf-8")
        read_levelled(path, ["A1", "A2", "B1", "B2", "C1", "C2"])
    with pytest.raises(ConfigError, match="whose words were counted, got None"):
        word_frequency(None)


@pytest.mark.skipif(not (SHARED / "kelly").is_dir(), reason="the word list of Kelly is not beside the repository")
def test_levels_of_real_text_agree_with_those_of_a_word_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages of twelve sentences of Tatoeba; half of the sentences to learn from, half to judge.

    The level of a passage is the mean level that Kelly's list gives its words, in six bands. The scale knows no list.
    """
    counted = pytest.importorskip("wordfreq")
    names = ["A1", "A2", "B1", "B2", "C1", "C2"]
    entries = json.loads((SHARED / "kelly" / "kelly_it.json").read_text(encoding="utf-8"))["full_list"]
    listed = {entry["word"].lower(): names.index(entry["cefr"]) for entry in reversed(entries) if entry["cefr"]}
    sentences = (SHARED / "tatoeba" / "tatoeba.ita-eng.ita").read_text(encoding="utf-8").splitlines()
    pairs = json.loads((SHARED / "tatoeba" / "italian_sentences.json").read_text(encoding="utf-8"))["sentence_pairs"]
    sentences += [pair["english"] for pair in pairs]  # the two keys of the file are swapped

    def mean_level(words: list[str]) -> float | None:
        found = [listed[word] for word in words if word in listed]
        return float(np.mean(found)) if len(found) >= 2 else None

    def split(sentence: str) -> list[str]:
        return re.findall(r"[^\W\d_]+", sentence.lower())

    scored = sorted(
        (score, sentence)
        for sentence in dict.fromkeys(sentences)
        if len(words := split(sentence)) >= 3 and (score := mean_level(words)) is not None
    )
    draw = np.random.default_rng(0)
    sides = draw.permutation(len(scored)) % 2

    def passages(side: int) -> list[str]:
        own = [sentence for (_, sentence), where in zip(scored, sides, strict=True) if where == side]
        made = []
        for _ in range(600):
            centre = int(draw.integers(0, len(own)))
            near = draw.integers(max(0, centre - 50), min(len(own), centre + 50), size=12)
            made.append(" ".join(own[at] if own[at][-1] in ".!?" else f"{own[at]}." for at in near))
        return made

    to_learn, to_judge = passages(0), passages(1)
    scores = [[mean_level(split(passage)) or 0.0 for passage in found] for found in (to_learn, to_judge)]
    cuts = np.quantile([score for score in scores[0] if score > 0], np.arange(1, 6) / 6)
    meant = [[names[place] for place in np.searchsorted(cuts, found)] for found in scores]

    def judge(frequency: Callable[[str], float]) -> float:
        by_level = {
            name: [passage for passage, level in zip(to_learn, meant[0], strict=True) if level == name]
            for name in names
        }
        scale = learn_scale(by_level, frequency)
        found = [scale.level_of(passage, frequency) or "" for passage in to_judge]
        return agreement(confusion(names, meant[1], found))

    ours = judge(lru_cache(None)(lambda word: counted.zipf_frequency(word, "it")))
    monkeypatch.setattr(levels, "measure", lambda text, frequency: np.r_[measure(text, frequency)[:1], np.zeros(9)])
    by_length = judge(lambda word: 0.0)
    print(f"agreement {ours:.2f}, by the length of sentences alone {by_length:.2f}")
    assert ours > 0.6 and ours > by_length + 0.3
