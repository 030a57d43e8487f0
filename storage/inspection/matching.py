"""When two texts count as the same: normalised, their digests, and the hashes of their runs of 13 words.

Normalised is: ASCII letters lower, whatever is no letter, digit or byte above ASCII a space, spaces run together. Runs
of 13 words are what GPT-3 was cleaned by (arXiv:2005.14165, appendix C).
"""

import hashlib
from functools import cache

import numpy as np

WORDS = 13
DIGEST_BYTES = 16
BLOCK_BYTES = 1 << 20  # of a text that is hashed at once: 3 arrays of 8 MB
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
INVERSE = pow(BASE, -1, 1 << 64)
FILTER_BITS = 24
_KEPT = bytes(range(ord("0"), ord("9") + 1)) + bytes(range(ord("a"), ord("z") + 1)) + bytes(range(0x80, 0x100))
_TABLE = bytes(byte if byte in _KEPT else ord(" ") for byte in bytes(range(256)).lower())


@cache
def _powers(base: int, count: int) -> np.ndarray:
    """The base to the power of 0, 1, 2, …"""
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def normalised(text: bytes) -> bytes:
    """The text as it is compared: words with one space between them."""
    return b" ".join(text.translate(_TABLE).split())


def text_digest(words: bytes) -> bytes:
    """Names a normalised text: 16 bytes, so that among 10**12 documents no two differing ones are called the same."""
    return hashlib.blake2b(words, digest_size=DIGEST_BYTES).digest()


def ngrams(words: bytes) -> np.ndarray:
    """Hashes (uint64) of every run of 13 words of a normalised text; none of fewer words.

    A hash is the run's bytes as a number to a fixed base, modulo 2**64: two different runs have the same one in about
    one of 2**64 pairs.
    """
    parts, start = [], 0
    while True:
        stop = _end(words, start)
        parts.append(_of_block(words[start:stop]))
        if stop == len(words):
            return np.concatenate(parts)
        start = stop
        for _ in range(WORDS - 1):  # the next block begins with the last twelve words of this one
            start = words.rindex(b" ", 0, start)
        start += 1


def _end(words: bytes, start: int) -> int:
    """Where a block ends: behind a word, BLOCK_BYTES on, or further where that is not twice 13 words."""
    if len(words) - start <= BLOCK_BYTES:
        return len(words)
    stop = words.rfind(b" ", start, start + BLOCK_BYTES)
    if stop < 0 or words.count(b" ", start, stop) < 2 * WORDS:
        stop = start
        for _ in range(2 * WORDS):
            stop = words.find(b" ", stop + 1)
            if stop < 0:
                return len(words)
    return stop


def _of_block(words: bytes) -> np.ndarray:
    letters = np.frombuffer(words, np.uint8)
    spaces = np.flatnonzero(letters == ord(" "))
    if len(spaces) < WORDS - 1:
        return np.empty(0, np.uint64)
    starts = np.append(0, spaces + 1)[: len(spaces) - WORDS + 2]
    stops = np.append(spaces, len(letters))[WORDS - 1 :]
    count = 1 << len(letters).bit_length()  # of few sizes, so that the tables are made once
    sums = np.empty(len(letters) + 1, np.uint64)
    sums[0] = 0
    np.cumsum(letters * _powers(BASE, count)[: len(letters)], out=sums[1:])
    hashes: np.ndarray = (sums[stops] - sums[starts]) * _powers(INVERSE, count)[starts]
    return hashes


class HashSet:
    """Hashes that are looked for: which of them occur among others."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._sorted = np.unique(hashes)
        # Most of what is asked is not wanted: one look at 16 MB tells of all but a few percent of it.
        self._filter = np.zeros(1 << FILTER_BITS, bool)
        self._filter[self._sorted >> np.uint64(64 - FILTER_BITS)] = True

    def among(self, hashes: np.ndarray) -> np.ndarray:
        """Those of the hashes that are wanted, in any order, some of them more than once."""
        if not len(self._sorted):
            return self._sorted
        near = hashes[self._filter[hashes >> np.uint64(64 - FILTER_BITS)]]
        place = np.minimum(np.searchsorted(self._sorted, near), len(self._sorted) - 1)
        found: np.ndarray = near[self._sorted[place] == near]
        return found
