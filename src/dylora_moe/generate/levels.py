"""How hard a text is, on a scale that levelled texts teach: bands over a line through what can be counted in it.

Length of sentences and words, the Gulpease index, how common its words are, and their levels where the user has a list
of words. A ridge regression on the number of the level gives the line, midpoints between the levels' means the bands.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dylora_moe.data.readers import read_rows
from dylora_moe.errors import ConfigError, DataError

Frequency = Callable[[str], float]
"""A word -> how common it is, as the logarithm of its frequency in a thousand million words (the Zipf scale)."""

Measure = Callable[[str], NDArray[np.float64]]
"""A text -> what is counted in it, the same numbers for every text."""

FEATURES = (
    "words a sentence",
    "letters a word",
    "gulpease",
    "long words",
    "mean frequency",
    "frequency of the rarest tenth",
    "frequency of the rarest quarter",
    "words below 3",
    "words below 4",
    "words below 5",
)
"""What is counted in every text."""
LIST_FEATURES = ("mean level of words", "level of the hardest tenth")
"""What is counted beside it where there is a list of words; of words that it has."""
MIN_WORDS = 12
"""Words under which a text says too little of its level."""

_MIN_TEXTS = 5  # of each level
_LONG = 8
_RIDGE = 1.0
_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE = re.compile(r"[.!?…]+(?:\s|$)")


def make_measure(frequency: Frequency, word_levels: Mapping[str, int] | None = None) -> Measure:
    """What counts `FEATURES` in a text, and `LIST_FEATURES` where there is a list.

    Source of Gulpease, made for Italian: Lucisano and Piemontese, GULPEASE: una formula per la predizione della
    difficoltà dei testi in lingua italiana, 1988; 89 + (300 sentences - 10 letters) / words.

    Args:
        frequency: How common words are.
        word_levels: Word in lower case -> number of its level, the easiest 0.
    """

    def count(text: str) -> NDArray[np.float64]:
        words = _WORD.findall(text.lower())
        number, letters = max(1, len(words)), sum(map(len, words))
        sentences = max(1, len(_SENTENCE.findall(text)))
        found = np.array([frequency(word) for word in words] or [0.0])
        counted = [
            number / sentences,
            letters / number,
            89 + (300 * sentences - 10 * letters) / number,
            sum(len(word) >= _LONG for word in words) / number,
            found.mean(),
            np.quantile(found, 0.1),
            np.quantile(found, 0.25),
            (found < 3).mean(),
            (found < 4).mean(),
            (found < 5).mean(),
        ]
        if word_levels is not None:
            listed = [word_levels[word] for word in words if word in word_levels] or [0]
            counted += [np.mean(listed), np.quantile(listed, 0.9)]
        return np.array(counted, np.float64)

    return count


def num_words(text: str) -> int:
    """As they are counted for `MIN_WORDS`."""
    return len(_WORD.findall(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelScale:
    """What was learned from levelled texts.

    Attributes:
        levels: Names, the easiest first.
        centre: Mean of each feature.
        spread: Its deviation.
        weights: Of each feature, in deviations.
        offset: Of the line.
        cuts: Where on the line each level ends, ascending; one fewer than levels.
        measure: What counts the features.
    """

    levels: tuple[str, ...]
    centre: tuple[float, ...]
    spread: tuple[float, ...]
    weights: tuple[float, ...]
    offset: float
    cuts: tuple[float, ...]
    measure: Measure

    def place(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Texts on the line: (texts, features) -> (texts,)."""
        scaled = (features - np.asarray(self.centre)) / np.asarray(self.spread)
        return np.asarray(scaled @ np.asarray(self.weights) + self.offset, np.float64)

    def level_of(self, text: str) -> str | None:
        """The level of a text; None where it has too few words to tell."""
        if num_words(text) < MIN_WORDS:
            return None
        return self.levels[int(np.searchsorted(self.cuts, self.place(self.measure(text)[None])[0]))]


def learn_scale(texts: Mapping[str, Sequence[str]], measure: Measure) -> LevelScale:
    """A scale from texts of each level.

    Args:
        texts: Level -> texts, the easiest level first; shorter ones than `MIN_WORDS` are left out.
        measure: What is counted in a text.

    Raises:
        DataError: There are fewer than two levels, or one has too few texts.
    """
    used = {level: [text for text in found if num_words(text) >= MIN_WORDS] for level, found in texts.items()}
    if len(used) < 2:
        raise DataError(f"levelled texts must be of two levels at least, got {', '.join(used) or 'none'}.")
    for level, found in used.items():
        if len(found) < _MIN_TEXTS:
            raise DataError(
                f"levelled texts must be at least {_MIN_TEXTS} of each level, of {MIN_WORDS} words and more, got "
                f"{len(found)} of {level}. Give more."
            )
    wanted = np.concatenate([np.full(len(found), place, np.float64) for place, found in enumerate(used.values())])
    features = np.stack([measure(text) for found in used.values() for text in found])
    centre, spread = features.mean(0), features.std(0)
    spread[spread == 0] = 1.0
    scaled = (features - centre) / spread
    # Every level counts as much, however many texts it has.
    share = np.concatenate([np.full(len(found), 1 / len(found)) for found in used.values()])
    share *= len(share) / share.sum()
    offset = float(np.average(wanted, weights=share))
    moment = (scaled * share[:, None]).T
    weights = np.linalg.solve(moment @ scaled + _RIDGE * np.eye(features.shape[1]), moment @ (wanted - offset))
    line = scaled @ weights + offset
    means = np.maximum.accumulate([line[wanted == place].mean() for place in range(len(used))])
    return LevelScale(
        levels=tuple(used),
        centre=tuple(centre.tolist()),
        spread=tuple(spread.tolist()),
        weights=tuple(weights.tolist()),
        offset=offset,
        cuts=tuple(((means[:-1] + means[1:]) / 2).tolist()),
        measure=measure,
    )


def read_levelled(path: Path, levels: Sequence[str]) -> dict[str, list[str]]:
    """Level -> texts, from a file with columns `text` and `level` (or `label`), the easiest level first.

    Args:
        path: Of the file.
        levels: Names that may stand in it, the easiest first.

    Raises:
        DataError: The file cannot be read, or a row has no text or another level.
    """
    found: dict[str, list[str]] = {}
    for where, row in read_rows(path):
        level, text = row.get("level", row.get("label")), row.get("text")
        if level not in levels or not isinstance(text, str):
            raise DataError(
                f"{where}: a levelled text must have a text and a level among {', '.join(levels)}, got level {level!r} "
                f"and {type(text).__name__}."
            )
        found.setdefault(str(level), []).append(text)
    return {level: found[level] for level in levels if level in found}


def read_word_levels(path: Path, levels: Sequence[str]) -> dict[str, int]:
    """Word in lower case -> number of its level, from a file with columns `word` and `level` (or `cefr`).

    A word that stands there twice has the easier level; of "il, lo, la" each is one. Rows without a level are left out.

    Args:
        path: Of the file.
        levels: Names that may stand in it, the easiest first.

    Raises:
        DataError: The file cannot be read, a row has no word or another level, or no row has a level.
    """
    found: dict[str, int] = {}
    for where, row in read_rows(path):
        word, level = row.get("word"), row.get("level", row.get("cefr"))
        if not isinstance(word, str) or (level and level not in levels):
            raise DataError(
                f"{where}: a list of words must have a word and a level among {', '.join(levels)}, or none, got level "
                f"{level!r} and {type(word).__name__}."
            )
        for each in map(str.strip, word.lower().split(",") if level else ()):
            found[each] = min(found.get(each, len(levels)), levels.index(str(level)))
    if not found:
        raise DataError(f"{path}: a list of words must have words with levels, got none.")
    return found


def word_frequency(language: str | None) -> Frequency:
    """How common words of a language are, by wordfreq (https://github.com/rspeer/wordfreq).

    Raises:
        ConfigError: It is not installed, or does not know the language.
    """
    try:
        import wordfreq
    except ImportError as error:
        raise ConfigError(
            "levelled_text needs the package wordfreq, which says how common words are. Install it: "
            "pip install 'dylora-moe[levels]'"
        ) from error
    if language is None or language not in wordfreq.available_languages():
        raise ConfigError(
            f"levelled_text needs answers_in of the prompt pack to be a language whose words were counted, got "
            f"{language}. One of {', '.join(sorted(wordfreq.available_languages()))}."
        )
    return lru_cache(maxsize=1 << 16)(lambda word: float(wordfreq.zipf_frequency(word, language)))


def confusion(levels: Sequence[str], asked: Sequence[str], found: Sequence[str]) -> list[list[int]]:
    """How many texts of each level (rows) were found to be of each (columns)."""
    counts = [[0] * len(levels) for _ in levels]
    for one, other in zip(asked, found, strict=True):
        counts[levels.index(one)][levels.index(other)] += 1
    return counts


def agreement(counts: Sequence[Sequence[int]]) -> float:
    """Cohen's kappa with quadratic weights of a confusion matrix: 1 for the same levels, 0 for what chance gives.

    Source: Cohen, Weighted kappa, Psychological Bulletin 70, 1968.
    """
    table = np.asarray(counts, np.float64)
    places = np.arange(len(table))
    weights = (places[:, None] - places) ** 2
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    chance = float((weights * expected).sum())
    return 1.0 - float((weights * table).sum()) / chance if chance else 1.0
