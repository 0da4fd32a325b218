"""Finds texts that are nearly the same: MinHash with banding gives candidates, the texts themselves decide.

A text is the set of its runs of three words. Runs that very many texts share are a template and say nothing, so that
rows of one long instruction and short contents are not taken for copies. What is kept of a text is in a file, 280 bytes
each; memory is 30 bytes a text, while a band is sorted.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Hashes, Hashes32 = NDArray[np.uint64], NDArray[np.uint32]

_SHINGLE_WORDS = 3
# 20 bands of 6 find a pair of similarity s with probability 1 - (1 - s^6)^20: 0.998 at 0.8, 0.79 at 0.65, 0.04 at 0.35.
_BANDS, _BAND_ROWS = 20, 6
_HASHES = _BANDS * _BAND_ROWS
# The estimate of 120 equal-or-not draws is off by at most 0.13 in 99.9 % of cases at 0.8 (binomial). One byte of each
# hash is kept, so that an unequal one passes for equal once in 256. Source: Li and Koenig 2010, b-bit minwise hashing.
_ESTIMATE_SLACK = 0.13
# Of a bucket, this many of the earliest texts are compared with, so that a template costs no quadratic time.
_BUCKET_TEXTS = 64
# A run of words in more texts of a sample than both is a template.
_TEMPLATE_TEXTS, _TEMPLATE_SHARE, _SAMPLE = 10, 0.01, 5000
_COUNTER_BITS = 22
_CHUNK = 4096
_SIGNATURES_KEPT = 1 << 14

# A word, a character of a script without spaces, or a symbol, since symbols carry the meaning of code and formulas.
# Punctuation of prose does not count.
_TOKENS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s.,;:!?'\"`]")


class SimilarTexts:
    """An index over texts that are read again when two of them may be alike.

    Args:
        read: Index -> the parts of a text, always equally many; two texts are as similar as their least similar parts.
        count: How many texts there are.
        file: Empty, to read from and write to; it takes 280 bytes a text.
    """

    def __init__(self, read: Callable[[int], Sequence[str]], count: int, file: BinaryIO) -> None:
        frequent = _find_templates(read, count)
        self._parts = lru_cache(maxsize=1024)(lambda index: [_Part(text, frequent) for text in read(index)])
        self._index = _Index(file, count)
        permutations = _permutations()
        for start in range(0, count, _CHUNK):
            chunk = range(start, min(start + _CHUNK, count))
            self._index.add(start, np.stack([_sign(_join(self._parts(index)), *permutations) for index in chunk]))
        self._index.sort()

    def find_earlier(self, index: int, *, threshold: float, allowed: NDArray[np.bool_]) -> tuple[int, float] | None:
        """The most similar of the texts before this one that are allowed, and its similarity if above the threshold.

        Args:
            index: Of the text; those asked for one after the other are found fastest.
            threshold: Least similarity, above 0.5.
            allowed: For each text, whether it may be found.
        """
        candidates = self._index.earlier(index)
        candidates = candidates[allowed[candidates]]
        best: tuple[int, float] | None = None
        for candidate in candidates[self._index.estimate(index, candidates) >= threshold - _ESTIMATE_SLACK].tolist():
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


class _Index:
    """A file of three tables: the texts in the order of a band's keys, for each band; where the bucket of a text begins
    in that order, or -1 for the first text of a bucket, for each band; and a byte of each hash, for each text.

    Until a band is sorted, its part of the first table has the keys of the texts.
    """

    def __init__(self, file: BinaryIO, count: int) -> None:
        self._file, self._count = file, count
        self._starts_of_block = lru_cache(maxsize=2)(self._read_starts)
        self._signature = lru_cache(maxsize=_SIGNATURES_KEPT)(self._read_signature)

    def add(self, first: int, hashes: Hashes32) -> None:
        """Add texts from number `first` on, one a row."""
        for band in range(_BANDS):
            self._write(_band_keys(hashes[:, band::_BANDS]), self._column(band) + 4 * first)
        self._write(hashes.astype(np.uint8), self._column(2 * _BANDS) + _HASHES * first)

    def sort(self) -> None:
        """Find the buckets, once all texts are there."""
        for band in range(_BANDS):
            keys = self._read(np.uint32, self._count, self._column(band))
            order = np.argsort(keys, kind="stable")  # earlier texts first in each bucket
            keys = keys[order]
            begins = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
            first = np.maximum.accumulate(np.where(begins, np.arange(len(keys), dtype=np.int32), 0))
            starts = np.empty(len(keys), dtype=np.int32)
            starts[order] = np.where(begins, -1, first)
            self._write(order.astype(np.int32), self._column(band))
            self._write(starts, self._column(_BANDS + band))

    def earlier(self, index: int) -> NDArray[np.int32]:
        """The earliest texts of this text's buckets that come before it, ascending, each once."""
        starts = self._starts_of_block(index // _CHUNK)[:, index % _CHUNK].tolist()
        found = [np.zeros(0, dtype=np.int32)]
        for band, start in enumerate(starts):
            if start >= 0:
                number = min(_BUCKET_TEXTS, self._count - start)
                found.append(self._read(np.int32, number, self._column(band) + 4 * start))
        texts = np.unique(np.concatenate(found))
        return texts[texts < index]

    def estimate(self, index: int, others: NDArray[np.int32]) -> NDArray[np.float64]:
        """Estimated similarity of a text to others, 0 to 1."""
        hashes = np.array([self._signature(other) for other in others.tolist()], dtype=np.uint8)
        return (hashes.reshape(-1, _HASHES) == self._signature(index)).mean(1)

    def _column(self, number: int) -> int:
        return 4 * number * self._count

    def _read_starts(self, block: int) -> NDArray[np.int32]:
        first = _CHUNK * block
        number = min(_CHUNK, self._count - first)
        columns = range(_BANDS, 2 * _BANDS)
        return np.stack([self._read(np.int32, number, self._column(column) + 4 * first) for column in columns])

    def _read_signature(self, text: int) -> NDArray[np.uint8]:
        return self._read(np.uint8, _HASHES, self._column(2 * _BANDS) + _HASHES * text)

    def _write(self, values: NDArray[Any], at: int) -> None:
        self._file.seek(at)
        self._file.write(values.tobytes())

    def _read(self, kind: type[np.generic], number: int, at: int) -> NDArray[Any]:
        self._file.seek(at)
        return np.frombuffer(self._file.read(number * np.dtype(kind).itemsize), dtype=kind)


def _band_keys(hashes: Hashes32) -> Hashes32:
    """One number for the hashes of a band, the same for the same hashes."""
    weights = _mix(np.arange(1, hashes.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return (_mix((hashes.astype(np.uint64) * weights).sum(1, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)


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
    drawn = (_mix(np.arange(2 * _HASHES, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)
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
