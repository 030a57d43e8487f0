"""The val split as a set of documents: 64-bit hashes of all val documents, which train shards leave out.

Documents are compared as lower-case words, so other spaces, capitals or punctuation make no difference.
The upper 24 bits hash the first words. They rule out nearly every train document without normalising all of its text,
which would take a fifth of the time that tokenising takes.
"""

import hashlib
import zlib

import numpy as np

from storage.digests import sha256
from storage.errors import ObjectCorrupt
from storage.keys import DatasetKeys
from storage.stores.store import Store, overwrite

HASH = np.dtype("<u8")
CHECKSUM_BYTES = 32  # the object begins with the sha256 of its hashes
LIMIT_BYTES = 1 << 32
FIRST_WORDS = 8
FIRST_BYTES = 128  # of a document nearly always hold more words
HIGH_BITS, LOW_BITS = 24, 40
_TABLE = bytes(byte if byte > 0x7F or chr(byte).isalnum() else ord(" ") for byte in bytes(range(256)).lower())


def normalised(text: bytes) -> bytes:
    """The lower-case words of a text, without ASCII punctuation and separated by single spaces."""
    return b" ".join(text.translate(_TABLE).split())


def hashed(text: bytes) -> int:
    """The hash of a document."""
    digest = hashlib.blake2b(normalised(text) or text, digest_size=LOW_BITS // 8).digest()
    return _first_words(text) << LOW_BITS | int.from_bytes(digest)


class ValDocuments:
    """The hashes in sorted order: `text in val_documents` tells whether a text is a val document."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._hashes = hashes
        flags = np.zeros(1 << HIGH_BITS, bool)
        flags[hashes >> HASH.type(LOW_BITS)] = True
        self._first_words = np.packbits(flags, bitorder="little").tobytes()  # 2 MB, a bit for each hash of first words

    def __contains__(self, text: bytes) -> bool:
        first_words = _first_words(text)
        if not self._first_words[first_words >> 3] >> (first_words & 7) & 1:
            return False
        value = HASH.type(hashed(text))
        return bool(self._hashes.searchsorted(value) < self._hashes.searchsorted(value, "right"))


def put(store: Store, dataset: str, name: str, hashes: np.ndarray) -> None:
    """Store the hashes, which are sorted. Replaces a damaged object; the val shards decide every byte."""
    body = hashes.tobytes()
    overwrite(store, DatasetKeys(dataset).val_documents(name), bytes.fromhex(sha256(body)) + body)


def read(store: Store, dataset: str, name: str) -> ValDocuments:
    """The stored hashes. Raises ObjectMissing, ObjectCorrupt."""
    key = DatasetKeys(dataset).val_documents(name)
    body = memoryview(store.read(key, LIMIT_BYTES).body)
    if len(body) % HASH.itemsize or bytes.fromhex(sha256(body[CHECKSUM_BYTES:])) != body[:CHECKSUM_BYTES]:
        raise ObjectCorrupt(f"object {key!r} of store {store.url!r} is damaged. Run the command again to rewrite it.")
    return ValDocuments(np.frombuffer(body[CHECKSUM_BYTES:], HASH))


def _first_words(text: bytes) -> int:
    words = text[:FIRST_BYTES].translate(_TABLE).split(None, FIRST_WORDS)
    if len(words) <= FIRST_WORDS:  # the last word may be cut
        words = text.translate(_TABLE).split(None, FIRST_WORDS)
    return zlib.crc32(b" ".join(words[:FIRST_WORDS])) >> 32 - HIGH_BITS
