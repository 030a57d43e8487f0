"""What a store can do: objects at keys, wherever they lie. Knows no dataset and no run, and no kind of store.

The same verbs for every kind of store. A write is atomic: a key holds all of the new bytes or what it held.
"""

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from storage import keys
from storage.errors import AlreadyExists, Conflict, ObjectCorrupt, ObjectMissing, StoreUnusable

Body = bytes | bytearray | memoryview
LINK_SECONDS = 7 * 86_400  # the longest that S3's signatures allow
LIMIT_BYTES = 1 << 26  # the largest object whose size nobody stated: a manifest of 130,000 shards has 20 MB


class Object(NamedTuple):
    """An object's bytes, its etag (an opaque token that `swap` compares) and the sha256 of the bytes, in hex."""

    body: bytes | bytearray
    etag: str
    sha256: str


class Stat(NamedTuple):
    """An object's key, size in bytes, when it was written (Unix seconds) and the sha256 that the store keeps of it.

    A listing knows no sha256, and not every store keeps one: then it is None.
    """

    key: str
    size: int
    modified: float
    sha256: str | None = None


class Capabilities(NamedTuple):
    """What a probe found: who answers, and whether a body that was damaged on its way is refused."""

    server: str
    refuses_damaged: bool


class Store(Protocol):
    """What every kind of store can do; `tests/storage/test_store.py` is the contract."""

    url: str

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        """The whole object. Raises ObjectMissing, and ObjectCorrupt for a damaged one or more than `limit_bytes`."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends. Raises ObjectMissing."""

    def put_new(self, key: str, body: Body) -> str:
        """Create the object and return its etag. Of any number of racing writers one wins; raises AlreadyExists."""

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        """Replace the object that `etag` names (None: there is none yet), return the new etag. Raises Conflict."""

    def stat(self, key: str) -> Stat:
        """Size, time and kept sha256 of the object. Raises ObjectMissing."""

    def list(self, prefix: str) -> Iterator[Stat]:
        """Every object whose key begins with `prefix`, in an order that differs from store to store."""

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when it is not there."""

    def probe(self) -> Capabilities:
        """Prove that conditional writes are honoured. Raises StoreUnusable when they are not."""

    def unfinished(self, before: float, *, remove: bool = False) -> tuple[str, ...]:
        """What killed writers left that is no object, begun before a time (Unix seconds); removed when asked."""

    def local_path(self, key: str) -> Path | None:
        """The file that holds the object, where the store keeps one on this host."""

    def link(self, key: str, endpoint: str = "") -> str:
        """Where a browser opens the object, at the server's `endpoint` as people reach it (empty: as this host does).

        Of a bucket the link holds its own permission to read this one object, for LINK_SECONDS.
        """


def check_conditions(store: Store, server: str) -> None:
    """Put, put again, swap twice at one key. Raises StoreUnusable when a write that must be refused is not."""
    key = keys.probe(secrets.token_hex(8))
    etag = store.put_new(key, b"1")
    ignored = ["create-only put", "compare-and-swap"]
    try:
        etag = store.put_new(key, b"2")
    except AlreadyExists:
        ignored.remove("create-only put")
    try:
        store.swap(key, b"3", etag)
        store.swap(key, b"4", etag)
    except Conflict:
        ignored.remove("compare-and-swap")
    store.delete(key)
    if ignored:
        raise StoreUnusable(
            f"store {store.url!r}: conditional writes were asked for, {server} ignores {' and '.join(ignored)}, so two "
            f"writers would lose each other's work. Use a folder on a local disk, AWS S3, SeaweedFS 4.48 or newer, or "
            f"MinIO of 2025-09-07 or newer."
        )


def clock(store: Store) -> float:
    """The store's own time (Unix seconds), which need not be this host's: that of an object written now."""
    key = keys.probe(secrets.token_hex(8))
    store.put_new(key, str(time.time()).encode())
    try:
        return store.stat(key).modified
    finally:
        store.delete(key)


def read_json(store: Store, key: str) -> dict[str, object] | None:
    """The JSON object at `key`, or None when there is none. Raises ObjectCorrupt for bytes that are no JSON."""
    try:
        body = store.read(key).body
    except ObjectMissing:
        return None
    try:
        value = json.loads(body)
        if not isinstance(value, dict):
            raise ValueError
    except ValueError as error:
        raise ObjectCorrupt(
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
