"""The expected leaks: words by regular expression, and every document compared with every other.

Shares no code with the leak search: no digests, hashes, plans or records. The documents are decoded from the shards.
"""

import random
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from model import tokenizer
from storage.datasets.manifest import Manifest
from storage.keys import DatasetKeys
from storage.stores.store import Store

Words = tuple[bytes, ...]
NGRAM_WORDS = 13


class Document(NamedTuple):
    """A document of a version: its split, shard, number and text, and the words by which it is compared."""

    split: str
    shard_id: str
    number: int
    text: str
    words: Words

    @property
    def name(self) -> tuple[str, int]:
        """The document's shard and number."""
        return self.shard_id, self.number


def words_of(text: bytes) -> Words:
    return tuple(re.findall(rb"[0-9a-z\x80-\xff]+", text.lower()))


def ngrams_of(words: Words) -> set[Words]:
    """Every n-gram of 13 words."""
    return {words[place : place + NGRAM_WORDS] for place in range(len(words) - NGRAM_WORDS + 1)}


def story(number: int, words: int = 30) -> str:
    """A deterministic text that shares no n-gram with the text of another number."""
    drawn = random.Random(number)
    return f"Story {number}: " + " ".join(f"w{drawn.randrange(2_000)}" for _ in range(words)) + "."


def restyled(text: str) -> str:
    """The same words with different case, spaces and punctuation."""
    return '"' + text.upper().replace(" ", " \n--  ").replace(":", ";") + '!"'


def reworded(text: str) -> str:
    first, _, rest = text.rpartition(" ")
    return f"{first} other{rest}"


def documents(store: Store, dataset: str, manifest: Manifest) -> list[Document]:
    """A version's documents in order, from the bytes of its shards."""
    decoded = []
    for row in manifest.rows():
        ids = np.frombuffer(store.read(DatasetKeys(dataset).shard(row.shard_id)).body, "<u2")
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.EOT))[1:]
        for number, part in enumerate(parts):
            text = tokenizer.decode(part[1:].tolist())
            decoded.append(Document(row.split, row.shard_id, number, text, words_of(text.encode())))
    return decoded


def repeats_of(all_documents: list[Document]) -> dict[tuple[str, int], tuple[str, int]]:
    """Train documents that repeat an earlier train document, each with the first such document."""
    train = [document for document in all_documents if document.split == "train" and document.words]
    firsts = {document.name: next(other for other in train if other.words == document.words) for document in train}
    return {name: first.name for name, first in firsts.items() if first.name != name}


def leaks_of(all_documents: list[Document]) -> dict[tuple[str, int], tuple[str, int]]:
    """Val documents that are also in train, each with the first equal train document."""
    train = [document for document in all_documents if document.split == "train"]
    pairs = {
        document.name: next((other for other in train if other.words == document.words), None)
        for document in all_documents
        if document.split == "val" and document.words
    }
    return {name: first.name for name, first in pairs.items() if first is not None}


def texts_of(all_documents: Iterable[Document], split: str | None = None) -> list[str]:
    return [document.text for document in all_documents if split in (None, document.split)]
