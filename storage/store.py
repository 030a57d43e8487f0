"""What a store can do: objects at keys, wherever they lie. Knows no dataset and no run, and no kind of store.

Eight verbs, the same for every kind of store. A write is atomic: a key holds all of the new bytes or what it held.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from storage.errors import Conflict, ObjectMissing, StoreUnusable

Body = bytes | bytearray | memoryview


class Object(NamedTuple):
    """An object's bytes and its etag: an opaque token that `swap` compares."""

    body: bytes
    etag: str


class Stat(NamedTuple):
    """What a listing says of an object: its key, its size in bytes and when it was written (Unix seconds)."""

    key: str
    size: int
    modified: float


class Store(Protocol):
    """What both kinds of store can do; `tests/storage/test_store.py` is the contract."""

    url: str

    def read(self, key: str) -> Object:
        """The whole object. Raises ObjectMissing."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends. Raises ObjectMissing."""

    def put_new(self, key: str, body: Body) -> str:
        """Create the object and return its etag. Of any number of racing writers one wins; raises AlreadyExists."""

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        """Replace the object that `etag` names (None: there is none yet), return the new etag. Raises Conflict."""

    def stat(self, key: str) -> Stat:
        """Size and time of the object. Raises ObjectMissing."""

    def list(self, prefix: str) -> Iterator[Stat]:
        """Every object whose key begins with `prefix`, sorted by key."""

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when it is not there."""

    def probe(self) -> None:
        """Prove that conditional writes are honoured. Raises StoreUnusable when they are not."""

    def local_path(self, key: str) -> Path | None:
        """The file that holds the object, where the store keeps one on this host."""


def read_json(store: Store, key: str) -> dict[str, object] | None:
    """The JSON object at `key`, or None when there is none. Raises StoreUnusable for bytes that are no JSON."""
    try:
        body = store.read(key).body
    except ObjectMissing:
        return None
    try:
        value = json.loads(body)
        if not isinstance(value, dict):
            raise ValueError
    except ValueError as error:
        raise StoreUnusable(
            f"object {key!r} of store {store.url!r} should be JSON, found {body[:40]!r}. Delete it and run again."
        ) from error
    return value


def overwrite(store: Store, key: str, body: Body) -> None:
    """Put the object whatever was there: for pages that people read and notes of which only the last one counts."""
    while True:
        try:
            etag = store.read(key).etag
        except ObjectMissing:
            etag = None
        try:
            store.swap(key, body, etag)
            return
        except Conflict:
            continue  # somebody else wrote in between; the last one wins
