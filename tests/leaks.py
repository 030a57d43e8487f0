"""What the tests of leaks expect: words by a regular expression, every document held against every other.

It shares nothing with digests, hashes, plans and records: a version's documents are its shards, decoded.
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
    """One document of a version: its split, where it stands, its text, and the words it is compared by."""

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
    """A text that shares no run of words with one of another number, and the same in every run."""
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
    found = []
    for row in manifest.rows():
        ids = np.frombuffer(store.read(DatasetKeys(dataset).shard(row.shard_id)).body, "<u2")
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.EOT))[1:]
        for number, part in enumerate(parts):
            text = tokenizer.decode(part[1:].tolist())
            found.append(Document(row.split, row.shard_id, number, text, words_of(text.encode())))
    return found


def repeats_of(found: list[Document]) -> dict[tuple[str, int], tuple[str, int]]:
    """Documents of train that repeat an earlier one of train, each with the first of them."""
    train = [one for one in found if one.split == "train" and one.words]
    firsts = {one.name: next(other for other in train if other.words == one.words) for one in train}
    return {name: first.name for name, first in firsts.items() if first.name != name}


def leaks_of(found: list[Document]) -> dict[tuple[str, int], tuple[str, int]]:
    """Documents of val that are in train, each with the first one there that it equals."""
    train = [one for one in found if one.split == "train"]
    pairs = {
        one.name: next((other for other in train if other.words == one.words), None)
        for one in found
        if one.split == "val" and one.words
    }
    return {name: first.name for name, first in pairs.items() if first is not None}


def texts_of(found: Iterable[Document], split: str | None = None) -> list[str]:
    return [one.text for one in found if split in (None, one.split)]
