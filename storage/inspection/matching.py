"""Digests of normalised texts, and hashes of their n-grams of 13 words, as for GPT-3 (arXiv:2005.14165, appendix C)."""

import hashlib
from functools import cache

import numpy as np

NGRAM_WORDS = 13
DIGEST_BYTES = 16
BLOCK_WORDS = 1 << 16  # of a text hashed at once: in English 400 KB, and three arrays of 3 MB
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
INVERSE = pow(BASE, -1, 1 << 64)
PREFIX_BITS = 24
PREFIX_SHIFT = np.uint64(64 - PREFIX_BITS)


def text_digest(words: bytes) -> bytes:
    """The digest of a normalised text: 16 bytes, so 10**12 texts hold a collision with a probability of 10**-15."""
    return hashlib.blake2b(words, digest_size=DIGEST_BYTES).digest()


def ngrams(words: bytes) -> np.ndarray:
    """Hashes (uint64) of every n-gram of 13 words in a normalised text, in order: two collide with odds of 2**-64."""
    if words.count(b" ") < BLOCK_WORDS:
        return _ngrams_of_block(words)
    spaces = np.flatnonzero(np.frombuffer(words, np.uint8) == ord(" "))
    edges = np.concatenate([[-1], spaces, [len(words)]])  # word n lies between edges n and n + 1
    first_words = np.arange(0, len(edges) - 1, BLOCK_WORDS)
    last_words = np.minimum(first_words + BLOCK_WORDS + NGRAM_WORDS - 1, len(edges) - 1)
    blocks = (words[start:stop] for start, stop in zip(edges[first_words] + 1, edges[last_words], strict=True))
    return np.concatenate([_ngrams_of_block(block) for block in blocks])


def _ngrams_of_block(words: bytes) -> np.ndarray:
    # With prefix sums of byte * BASE**position, an n-gram's hash is a difference of two sums, divided by BASE**start.
    letters = np.frombuffer(words, np.uint8)
    spaces = np.flatnonzero(letters == ord(" "))
    if len(spaces) < NGRAM_WORDS - 1:
        return np.empty(0, np.uint64)
    starts = np.append(0, spaces + 1)[: len(spaces) - NGRAM_WORDS + 2]
    stops = np.append(spaces, len(letters))[NGRAM_WORDS - 1 :]
    count = 1 << len(letters).bit_length()  # a power of two: only about 20 tables are ever computed
    sums = np.empty(len(letters) + 1, np.uint64)
    sums[0] = 0
    np.cumsum(letters * _powers(BASE, count)[: len(letters)], out=sums[1:])
    hashes: np.ndarray = (sums[stops] - sums[starts]) * _powers(INVERSE, count)[starts]
    return hashes


@cache
def _powers(base: int, count: int) -> np.ndarray:
    """base**0, base**1, …, base**(count - 1), modulo 2**64."""
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


class HashSet:
    """A set of hashes to intersect with many arrays, fast when most arrays contain few of the hashes."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._sorted = np.unique(hashes)
        # 16 MB of flags for the first 24 bits rule out all but a few percent of the hashes that are not in the set.
        self._prefixes = np.zeros(1 << PREFIX_BITS, bool)
        self._prefixes[self._sorted >> PREFIX_SHIFT] = True

    def intersect(self, hashes: np.ndarray) -> np.ndarray:
        """The hashes that are in the set, in their order, repeats included."""
        if not len(self._sorted):
            return self._sorted
        candidates = hashes[self._prefixes[hashes >> PREFIX_SHIFT]]
        places = np.minimum(np.searchsorted(self._sorted, candidates), len(self._sorted) - 1)
        members: np.ndarray = candidates[self._sorted[places] == candidates]
        return members
