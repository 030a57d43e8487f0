"""The expected leaks: words by a regular expression, every document compared with every other.

Shares nothing with the code under test: no digests, hashes, plans or records. A version's documents are its shards,
decoded.
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
RUN = 13


class Document(NamedTuple):
    """One document of a version: its split, its place, its text, and the words that it is compared by."""

    split: str
    shard_id: str
    number: int
    text: str
    words: Words

    @property
    def name(self) -> tuple[str, int]:
        """Shard and number."""
        return self.shard_id, self.number


def words_of(text: bytes) -> Words:
    return tuple(re.findall(rb"[0-9a-z\x80-\xff]+", text.lower()))


def runs_of(words: Words) -> set[Words]:
    """Every run of 13 words."""
    return {words[place : place + RUN] for place in range(len(words) - RUN + 1)}


def story(number: int, words: int = 30) -> str:
    """A text, the same in every process, that shares no run of words with that of another number."""
    drawn = random.Random(number)
    return f"Story {number}: " + " ".join(f"w{drawn.randrange(2_000)}" for _ in range(words)) + "."


def shouted(text: str) -> str:
    """The same words with other case, spaces and punctuation."""
    return '"' + text.upper().replace(" ", " \n--  ").replace(":", ";") + '!"'


def one_word_other(text: str) -> str:
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
    """Documents of train that repeat an earlier one of train, each with the first of them."""
    train = [document for document in all_documents if document.split == "train" and document.words]
    firsts = {document.name: next(other for other in train if other.words == document.words) for document in train}
    return {name: first.name for name, first in firsts.items() if first.name != name}


def leaks_of(all_documents: list[Document]) -> dict[tuple[str, int], tuple[str, int]]:
    """Documents of val that are also in train, each with the first of train that it equals."""
    train = [document for document in all_documents if document.split == "train"]
    pairs = {
        document.name: next((other for other in train if other.words == document.words), None)
        for document in all_documents
        if document.split == "val" and document.words
    }
    return {name: first.name for name, first in pairs.items() if first is not None}


def texts_of(all_documents: Iterable[Document], split: str | None = None) -> list[str]:
    return [document.text for document in all_documents if split in (None, document.split)]
