"""Finds texts that are nearly the same: MinHash with banding gives candidates, the texts themselves decide.

A text is the set of its runs of three words. Runs that very many texts share are a template and say nothing, so that
rows of one long instruction and short contents are not taken for copies. Signatures are kept in a file, 200 bytes a
text; memory is about 40 bytes a text and 8 a pair of texts that may be copies.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Hashes, Hashes32, Places = NDArray[np.uint64], NDArray[np.uint32], NDArray[np.int64]

_SHINGLE_WORDS = 3
# 20 bands of 6 find a pair of similarity s with probability 1 - (1 - s^6)^20: 0.998 at 0.8, 0.79 at 0.65, 0.04 at 0.35.
_BANDS, _BAND_ROWS = 20, 6
_HASHES = _BANDS * _BAND_ROWS
# The estimate of 120 equal-or-not draws is off by at most 0.13 in 99.9 % of cases at 0.8 (binomial). One byte of each
# hash is kept, so that an unequal one passes for equal once in 256. Source: Li and Koenig 2010, b-bit minwise hashing.
_ESTIMATE_SLACK = 0.13
# Of a bucket, this many of the earliest texts are looked at, and of those that seem alike this many compared, so that
# a template costs no quadratic time.
_BUCKET_TEXTS, _CANDIDATES = 64, 16
# A run of words in more texts of a sample than both is a template.
_TEMPLATE_TEXTS, _TEMPLATE_SHARE, _SAMPLE = 10, 0.01, 5000
_COUNTER_BITS = 22
_CHUNK = 4096

# A word, a character of a script without spaces, or a symbol, since symbols carry the meaning of code and formulas.
# Punctuation of prose does not count.
_TOKENS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s.,;:!?'\"`]")


class SimilarTexts:
    """Texts to be compared; they are read again when two of them may be alike.

    Args:
        read: Index -> the parts of a text, always equally many; two texts are as similar as their least similar parts.
        count: How many texts there are.
    """

    def __init__(self, read: Callable[[int], Sequence[str]], count: int) -> None:
        frequent = _find_templates(read, count)
        self._parts = lru_cache(maxsize=1024)(lambda index: [_Part(text, frequent) for text in read(index)])
        self._count = count

    def similarity(self, first: int, second: int) -> float:
        """Jaccard similarity of the least similar parts of two texts, 0 to 1."""
        pairs = zip(self._parts(first), self._parts(second), strict=True)
        return min(_similar(one, other) for one, other in pairs)

    def most_similar(self, index: int, others: Sequence[int], *, threshold: float) -> tuple[int, float] | None:
        """The first of the most similar of other texts, and its similarity if it is at least the threshold."""
        found = [(other, self.similarity(index, other)) for other in others]
        best = max(found, key=lambda pair: pair[1], default=None)
        return best if best and best[1] >= threshold else None

    def candidates(
        self, *, threshold: float, among_first: int | None = None, scratch: Path | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Each text that may be like earlier ones, in order, with those.

        Args:
            threshold: Similarity wanted, above 0.5.
            among_first: Only texts after this many are looked at, and compared with these; None for all with all.
            scratch: Folder for the signatures, which are removed again; the system's own if None.
        """
        with tempfile.TemporaryFile(dir=scratch) as file:
            signatures, permutations = _Signatures(file, self._count), _permutations()
            for start in range(0, self._count, _CHUNK):
                chunk = range(start, min(start + _CHUNK, self._count))
                signatures.write(start, np.stack([_sign(_join(self._parts(index)), *permutations) for index in chunk]))
            pairs = np.zeros(0, dtype=np.uint64)  # the later text in the high half, the earlier one in the low half
            for band in range(_BANDS):
                found = _pairs_of_band(signatures, band, threshold - _ESTIMATE_SLACK, among_first)
                pairs = np.union1d(pairs, found)
        later, earlier = pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)
        starts = np.flatnonzero(np.diff(later, prepend=~later[:1]))
        for start, stop in pairwise([*starts.tolist(), len(later)]):
            yield int(later[start]), earlier[start:stop].tolist()


class _Part:
    """Hashed shingles of a part of a text, ascending, each once; `telling` are those that are no template."""

    __slots__ = ("everything", "telling")

    def __init__(self, text: str, frequent: NDArray[np.bool_]) -> None:
        self.everything = shingles(text)
        self.telling = self.everything[~frequent[self.everything >> np.uint64(64 - _COUNTER_BITS)]]


class _Signatures:
    """A file of MinHash signatures: keys, one band after the other, and then a byte of each hash, text by text."""

    def __init__(self, file: BinaryIO, count: int) -> None:
        self._file, self._count = file, count

    def write(self, start: int, hashes: Hashes32) -> None:
        """Add the signatures of texts from number `start` on, one a row."""
        for band in range(_BANDS):
            self._file.seek(4 * (band * self._count + start))
            self._file.write(_band_keys(hashes[:, band::_BANDS]).tobytes())
        self._file.seek(self._place(start))
        self._file.write(hashes.astype(np.uint8).tobytes())

    def keys(self, band: int) -> Hashes32:
        """The key of each text."""
        self._file.seek(4 * band * self._count)
        return np.frombuffer(self._file.read(4 * self._count), dtype=np.uint32)

    def estimate(self, first: Places, second: Places) -> NDArray[np.float64]:
        """Estimated similarity of the texts of each pair, 0 to 1."""
        texts, at = np.unique(np.concatenate([first, second]), return_inverse=True)
        hashes = np.empty((len(texts), _HASHES), dtype=np.uint8)
        for row, text in zip(hashes, texts.tolist(), strict=True):
            self._file.seek(self._place(text))
            row[:] = np.frombuffer(self._file.read(_HASHES), dtype=np.uint8)
        return (hashes[at[: len(first)]] == hashes[at[len(first) :]]).mean(1)

    def _place(self, text: int) -> int:
        return 4 * _BANDS * self._count + _HASHES * text


def _band_keys(hashes: Hashes32) -> Hashes32:
    """One number for the hashes of a band, the same for the same hashes."""
    weights = _mix(np.arange(1, hashes.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return (_mix((hashes.astype(np.uint64) * weights).sum(1, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)


def _pairs_of_band(signatures: _Signatures, band: int, least: float, among_first: int | None) -> Hashes:
    """Pairs of texts of one bucket that seem this much alike: the later in the high half, the earlier in the low."""
    keys = signatures.keys(band)
    order = np.argsort(keys, kind="stable")  # earlier texts first in each bucket
    keys = keys[order]
    shared = np.zeros(len(keys) + 1, dtype=np.bool_)
    np.equal(keys[1:], keys[:-1], out=shared[1:-1])
    shared = shared[1:] | shared[:-1]
    texts, keys = order[shared], keys[shared]
    del order, shared
    begins = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
    number_found = np.zeros(len(texts), dtype=np.int8)
    pairs = [np.zeros(0, dtype=np.uint64)]
    for step in range(_BUCKET_TEXTS):
        asked = np.flatnonzero((first + step < np.arange(len(texts))) & (number_found < _CANDIDATES))
        if among_first is not None:
            asked = asked[(texts[asked] >= among_first) & (texts[first[asked] + step] < among_first)]
        for start in range(0, len(asked), _CHUNK):
            places = asked[start : start + _CHUNK]
            later, earlier = texts[places], texts[first[places] + step]
            alike = signatures.estimate(later, earlier) >= least
            number_found[places] += alike
            pairs.append((later[alike].astype(np.uint64) << np.uint64(32)) | earlier[alike].astype(np.uint64))
    return np.concatenate(pairs)


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
