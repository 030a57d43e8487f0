"""The interface of a store: objects at keys. Every write is atomic: it stores all of its bytes or none."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from storage import keys
from storage.digests import sha256
from storage.errors import Conflict, ObjectCorrupt, ObjectMissing, StoreUnusable

T = TypeVar("T")
REMEDY = "Delete it and run the command again."
LINK_SECONDS = 7 * 86_400  # the longest that S3 signatures allow
LIMIT_BYTES = 1 << 26  # default size limit of a read; a manifest of 130,000 shards has 20 MB


class FileBody:
    """An open file of this host as a body, with its sha256. Stores read it in slices, never whole into memory."""

    def __init__(self, file: BinaryIO, sha256: str = "") -> None:
        file.flush()
        file.seek(0)
        self.sha256 = sha256 or hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
        self._file, self._size_bytes = file, os.fstat(file.fileno()).st_size

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size_bytes)
        return os.pread(self._file.fileno(), stop - start, start)  # threads upload parts


Body = bytes | bytearray | memoryview | FileBody


def sha256_of(body: Body) -> str:
    """The sha256 of a body."""
    return body.sha256 if isinstance(body, FileBody) else sha256(body)


class Object(NamedTuple):
    """An object's bytes, its etag (an opaque token for `swap`) and the sha256 of the bytes in hex."""

    body: bytes | bytearray
    etag: str
    sha256: str


class Stat(NamedTuple):
    """The metadata of an object."""

    key: str
    size: int  # bytes
    modified: float  # Unix seconds
    sha256: str | None = None  # None in a listing, and in stores that keep none


class ReadableStore(Protocol):
    """What it takes to read a dataset: a store, or a repository of the Hub."""

    url: str

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        """Read the whole object. Raises ObjectMissing, and ObjectCorrupt if damaged or larger than `limit_bytes`."""

    def local_path(self, key: str) -> Path | None:
        """The object's file, if the store keeps its objects as files on this host."""
        keys.check_key(key)
        return None


class Store(ReadableStore, Protocol):
    """The interface of every kind of store; `tests/storage/stores/test_store.py` is the contract.

    A store retries requests itself. It raises StoreUnavailable when retries are used up, StoreUnusable for what a retry
    cannot fix, and never an exception of the library that it uses. A bucket of source files may hold keys of any form.
    """

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read `length` bytes from `start`, fewer at the end of the object. Raises ObjectMissing."""

    def put_new(self, key: str, body: Body) -> str:
        """Create the object and return its etag. Exactly one of several racing writers wins. Raises Conflict."""
        return self.swap(key, body, None)

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        """Replace the object if it still has `etag` (None: if absent) and return the new etag. Raises Conflict."""

    def stat(self, key: str) -> Stat:
        """Size, time and stored sha256 of the object. Raises ObjectMissing."""

    def list(self, prefix: str) -> Iterator[Stat]:
        """Every object whose key begins with `prefix`. The order depends on the store."""

    def delete(self, key: str) -> None:
        """Remove the object. A missing object is not an error."""

    def probe(self) -> tuple[str, bool]:
        """The server's name, and whether it rejects a body damaged in transit. Raises as `check_conditions`."""

    def unfinished(self, before: float, *, remove: bool = False) -> Iterator[str]:
        """Describe leftovers of killed writers that began before a time (Unix seconds), and optionally remove them."""

    def link(self, key: str, endpoint: str = "") -> str:
        """A URL for a browser to read only this object; a bucket's uses `endpoint` and expires after LINK_SECONDS."""


def check_conditions(store: Store, server: str) -> None:
    """Test create-only put and compare-and-swap on a scratch key. Raises StoreUnusable if either is ignored."""
    key = keys.probe()
    etag = store.put_new(key, b"1")
    ignored = []
    with suppress(Conflict):
        etag = store.put_new(key, b"2")
        ignored.append("create-only put")
    with suppress(Conflict):
        store.swap(key, b"3", etag)
        store.swap(key, b"4", etag)
        ignored.append("compare-and-swap")
    store.delete(key)
    if ignored:
        problem = f"{server} ignores conditional writes ({' and '.join(ignored)}): concurrent writers would overwrite"
        remedy = "Use a folder on a local disk, AWS S3, SeaweedFS 4.48 or newer, or MinIO 2025-09-07 or newer."
        raise StoreUnusable(f"store {store.url!r}: {problem} each other. {remedy}")


def check_size(name: str, size_bytes: int, limit_bytes: int) -> None:
    """Raise ObjectCorrupt for an object that is larger than expected."""
    if size_bytes > limit_bytes:
        remedy = "Delete it, then repeat the command that wrote it."
        raise ObjectCorrupt(f"{name} has {size_bytes:,} bytes, more than the limit of {limit_bytes:,}. {remedy}")


def clock(store: Store) -> float:
    """The store's current time (Unix seconds), which may differ from this host's."""
    key = keys.probe()
    store.put_new(key, b"")
    try:
        return store.stat(key).modified
    finally:
        store.delete(key)


def read_as(
    store: ReadableStore, key: str, kind: type[T], fits: Callable[[T], object] = lambda _: True, remedy: str = REMEDY
) -> T | None:
    """The JSON object at `key` as a `kind`, or None if the key does not exist.

    Raises ObjectCorrupt with the remedy for anything else, and if `fits` returns a false value or raises ValueError.
    """
    found, problem = f"object {key!r} of store {store.url!r} is damaged:", "a field is missing or has a wrong value"
    body: bytes | bytearray = b""
    try:
        body = store.read(key).body
        value: T = _adapter(kind).validate_json(body)  # type: ignore[arg-type]  # mypy: a type is hashable
        if fits(value):
            return value
    except ObjectMissing:
        path = store.local_path(key)
        if path is None or not path.is_dir():
            return None
        problem = "a folder is in its place"
    except ObjectCorrupt as error:
        found, problem = "", str(error).partition(". ")[0]  # without the error's own remedy
    except ValueError as error:
        problem = f"{first_problem(error)}; it begins with {bytes(body[:40])!r}"
    raise ObjectCorrupt(f"{found} {problem}. {remedy}".lstrip())


def first_problem(error: Exception) -> str:
    """The first problem of a value that could not be parsed, in one line."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join(part for part in (".".join(map(str, first["loc"]))[:80], first["msg"][:160].rstrip(".")) if part)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def put_once(store: Store, key: str, body: Body) -> None:
    """Write the object unless it exists."""
    with suppress(Conflict):
        store.put_new(key, body)


def overwrite(store: Store, key: str, body: Body) -> None:
    """Write the object whether or not it exists. The last of several racing writers wins."""
    while True:
        etag = None
        try:
            etag = store.read(key).etag
        except ObjectMissing:
            pass
        except ObjectCorrupt:  # no read gives its etag
            store.delete(key)
        with suppress(Conflict):  # another writer was faster
            store.swap(key, body, etag)
            return
