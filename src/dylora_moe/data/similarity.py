"""Finds texts that are nearly the same: MinHash with banding gives candidates, the texts themselves decide.

A text is the set of its runs of three words. Runs that very many texts share are a template and say nothing, so that
rows of one long instruction and short contents are not taken for copies. Memory is about 750 bytes a text.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Hashes, Hashes32 = NDArray[np.uint64], NDArray[np.uint32]

_SHINGLE_WORDS = 3
# 20 bands of 6 find a pair of similarity s with probability 1 - (1 - s^6)^20: 0.998 at 0.8, 0.79 at 0.65, 0.04 at 0.35.
_BANDS, _BAND_ROWS = 20, 6
# The estimate of 120 equal-or-not draws is off by at most 0.13 in 99.9 % of cases at 0.8 (binomial).
_ESTIMATE_SLACK = 0.13
# Of a bucket, this many of the earliest texts are compared with, so that a template costs no quadratic time.
_BUCKET_TEXTS = 64
# A run of words in more texts of a sample than both is a template.
_TEMPLATE_TEXTS, _TEMPLATE_SHARE, _SAMPLE = 10, 0.01, 5000
_COUNTER_BITS = 22
_CHUNK = 4096

# A word, a character of a script without spaces, or a symbol, since symbols carry the meaning of code and formulas.
# Punctuation of prose does not count.
_TOKENS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s.,;:!?'\"`]")


class SimilarTexts:
    """An index over texts that are read again when two of them are compared; only signatures are kept.

    Args:
        read: Index -> the parts of a text, always equally many; two texts are as similar as their least similar parts.
        count: How many texts there are.
    """

    def __init__(self, read: Callable[[int], Sequence[str]], count: int) -> None:
        self._frequent = _find_templates(read, count)
        self._parts = lru_cache(maxsize=1024)(lambda index: [_Part(text, self._frequent) for text in read(index)])
        self._signatures = np.empty((count, _BANDS * _BAND_ROWS), dtype=np.uint32)
        factors, terms = _permutations()
        for index in range(count):
            self._signatures[index] = _sign(_join(self._parts(index)), factors, terms)
        self._bands = [_Band(self._signatures[:, at::_BANDS]) for at in range(_BANDS)]

    def find_earlier(self, index: int, *, threshold: float, allowed: NDArray[np.bool_]) -> tuple[int, float] | None:
        """The most similar of the texts before this one that are allowed, and its similarity if above the threshold.

        Args:
            index: Of the text.
            threshold: Least similarity, above 0.5.
            allowed: For each text, whether it may be found.
        """
        candidates = np.unique(np.concatenate([band.earlier(index) for band in self._bands]))
        candidates = candidates[allowed[candidates]]
        estimates = (self._signatures[candidates] == self._signatures[index]).mean(1)
        best: tuple[int, float] | None = None
        for candidate in candidates[estimates >= threshold - _ESTIMATE_SLACK].tolist():
            similarity = self.similarity(index, candidate)
            if similarity >= threshold and (best is None or similarity > best[1]):
                best = candidate, similarity
        return best

    def similarity(self, first: int, second: int) -> float:
        """Jaccard similarity of the least similar parts of two texts, 0 to 1."""
        pairs = zip(self._parts(first), self._parts(second), strict=True)
        return min(_similar(one, other) for one, other in pairs)


class _Part:
    """Hashed shingles of a part of a text, ascending, each once; `telling` are those that are no template."""

    __slots__ = ("everything", "telling")

    def __init__(self, text: str, frequent: NDArray[np.bool_]) -> None:
        self.everything = shingles(text)
        self.telling = self.everything[~frequent[self.everything >> np.uint64(64 - _COUNTER_BITS)]]


class _Band:
    """Texts sorted by one band of their signatures, earlier texts first where it is the same."""

    def __init__(self, signatures: NDArray[np.uint32]) -> None:
        weights = _mix(np.arange(1, signatures.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
        keys = _mix((signatures.astype(np.uint64) * weights).sum(1, dtype=np.uint64))
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)]
        self._order = order.astype(np.int32)
        self._place, self._start = np.empty_like(self._order), np.empty_like(self._order)
        self._place[order] = np.arange(len(order), dtype=np.int32)
        self._start[order] = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))

    def earlier(self, index: int) -> NDArray[np.int32]:
        """The earliest texts of this text's bucket that come before it."""
        start = self._start[index]
        return self._order[start : min(self._place[index], start + _BUCKET_TEXTS)]


def shingles(text: str) -> Hashes:
    """Hashes of a text's runs of three tokens (of all, if fewer), ascending, each once; case does not count."""
    words = _TOKENS.findall(text.casefold()) or [text.strip()]
    codes = np.array(list(map(_code, words)), dtype=np.uint64)
    size = min(len(words), _SHINGLE_WORDS)
    runs = np.full(len(words) - size + 1, size, dtype=np.uint64)
    for offset in range(size):
        runs = _mix(runs ^ codes[offset : offset + len(runs)])
    return np.unique(runs)


@lru_cache(maxsize=1 << 16)
def _code(word: str) -> int:
    return crc32(word.encode("utf-8", "surrogatepass"))


def _mix(values: Hashes) -> Hashes:
    """Scatter 64-bit numbers over 64 bits, one to one. Source: the finaliser of SplitMix64 (OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _find_templates(read: Callable[[int], Sequence[str]], count: int) -> NDArray[np.bool_]:
    """For each value of the first bits of a run's hash, whether so many texts have it that it tells nothing."""
    counts = np.zeros(1 << _COUNTER_BITS, dtype=np.int32)
    sample = range(0, count, max(1, count // _SAMPLE))
    for index in sample:
        for text in read(index):
            counts[shingles(text) >> np.uint64(64 - _COUNTER_BITS)] += 1
    return counts > max(_TEMPLATE_TEXTS, _TEMPLATE_SHARE * len(sample))


def _permutations() -> tuple[Hashes32, Hashes32]:
    """Odd factors and terms of 120 hash functions h -> h * factor + term, of 32 bits, eight in one instruction."""
    drawn = (_mix(np.arange(2 * _BANDS * _BAND_ROWS, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)
    return drawn[::2] | np.uint32(1), drawn[1::2]


def _join(parts: Sequence[_Part]) -> Hashes:
    """Shingles of all parts, apart from each other; templates too where there is nothing else."""
    telling = [_mix(part.telling + np.uint64(number)) for number, part in enumerate(parts)]
    if any(map(len, telling)):
        return np.concatenate(telling)
    return np.concatenate([_mix(part.everything + np.uint64(number)) for number, part in enumerate(parts)])


def _sign(hashes: Hashes, factors: Hashes32, terms: Hashes32) -> Hashes32:
    """MinHash signature. Source: Broder 1997, with multiply-shift hashing of the high half."""
    smallest = np.full(len(factors), np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(hashes), _CHUNK):
        values = (hashes[start : start + _CHUNK, None] >> np.uint64(32)).astype(np.uint32)
        smallest = np.minimum(smallest, (values * factors + terms).min(0))
    return smallest


def _similar(one: _Part, other: _Part) -> float:
    """Over all runs and over the telling ones alike: neither a template nor a few rare words make two texts equal."""
    if not len(one.telling) or not len(other.telling):
        return float(np.array_equal(one.everything, other.everything))
    return min(_jaccard(one.everything, other.everything), _jaccard(one.telling, other.telling))


def _jaccard(one: Hashes, other: Hashes) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
