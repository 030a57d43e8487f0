"""The contract of every kind of store. A new kind is one more entry of `STORES` in store_kinds.py."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from storage.errors import Conflict, ObjectCorrupt, ObjectMissing
from storage.stores.opening import open_store
from storage.stores.s3_client import own_client
from storage.stores.store import Body, Store, overwrite
from tests.making import read_json
from tests.storage.store_kinds import listed

BAD_KEYS = [
    "",
    ".",
    "..",
    "/abs",
    "a//b",
    "a/",
    "/",
    ".hidden",
    "a/.hidden",
    "a/../b",
    "a/..",
    "a b",
    "a\n",
    "a\0b",
    "é",
]


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


# Create-only put


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_put_object_is_read_back(store: Store, kind: Callable[[bytes], Body]) -> None:
    etag = store.put_new("a/b.bin", kind(b"some bytes"))
    assert store.read("a/b.bin")[:2] == (b"some bytes", etag)


def test_an_empty_object_is_an_object(store: Store) -> None:
    etag = store.put_new("empty", b"")
    assert store.read("empty")[:2] == (b"", etag)
    assert store.stat("empty").size == 0
    assert store.read_range("empty", 0, 10) == b""


def test_an_object_over_the_size_limit_is_refused(store: Store) -> None:
    store.put_new("key", b"some bytes")
    assert store.read("key", 10).body == b"some bytes"
    with pytest.raises(ObjectCorrupt, match=r"key.*10 bytes.*limit of 9"):
        store.read("key", 9)


def test_a_second_put_is_refused_and_leaves_the_first_bytes(store: Store) -> None:
    etag = store.put_new("key", b"first")
    for body in (b"second", b"first"):
        with pytest.raises(Conflict, match="key"):
            store.put_new("key", body)
    assert store.read("key")[:2] == (b"first", etag)


def test_a_deleted_key_can_be_put_again(store: Store) -> None:
    store.put_new("key", b"first")
    store.delete("key")
    store.put_new("key", b"second")
    assert store.read("key").body == b"second"


# Compare-and-swap


def test_swap_replaces_the_object_that_was_read(store: Store) -> None:
    first = store.swap("pointer", b"one", None)
    assert store.read("pointer")[:2] == (b"one", first)
    second = store.swap("pointer", b"two", first)
    assert store.read("pointer")[:2] == (b"two", second)
    assert store.swap("pointer", b"three", second) != second


def test_swap_takes_the_etag_of_a_put(store: Store) -> None:
    store.swap("key", b"two", store.put_new("key", b"one"))
    assert store.read("key").body == b"two"


def test_swap_with_a_stale_etag_is_a_conflict_and_changes_nothing(store: Store) -> None:
    first = store.swap("pointer", b"one", None)
    second = store.swap("pointer", b"two", first)
    with pytest.raises(Conflict, match="pointer"):
        store.swap("pointer", b"three", first)
    assert store.read("pointer")[:2] == (b"two", second)


def test_swap_that_expects_no_object_conflicts_with_an_existing_one(store: Store) -> None:
    store.put_new("key", b"one")
    with pytest.raises(Conflict):
        store.swap("key", b"two", None)
    assert store.read("key").body == b"one"


def test_swap_that_expects_an_object_conflicts_with_a_missing_one(store: Store) -> None:
    etag = store.put_new("key", b"one")
    store.delete("key")
    with pytest.raises(Conflict):
        store.swap("key", b"two", etag)
    assert listed(store, "key") == []


def test_overwrite_creates_and_replaces(store: Store) -> None:
    overwrite(store, "page", b"one")
    overwrite(store, "page", b"two")
    assert store.read("page").body == b"two"


# Reading


def test_a_link_opens_only_its_object_and_needs_no_credentials(store: Store) -> None:
    store.put_new("runs/a/report.html", b"<p>one")
    store.put_new("runs/a/other.html", b"<p>two")
    link = store.link("runs/a/report.html")
    with urlopen(link) as page:  # noqa: S310  # our own server, or a file
        assert page.read() == b"<p>one"
        assert page.headers["Content-Type"] == "text/html"
    if link.startswith("http"):
        with pytest.raises(HTTPError, match="403") as refused:
            urlopen(link.replace("report", "other"))  # noqa: S310
        refused.value.close()
        assert store.link("runs/a/report.html", "http://elsewhere:1").startswith("http://elsewhere:1/")


@pytest.mark.parametrize(
    "access",
    [
        lambda store: store.read("a/none"),
        lambda store: store.read_range("a/none", 0, 1),
        lambda store: store.stat("a/none"),
    ],
)
def test_a_missing_object_is_named(store: Store, access: Callable[[Store], object]) -> None:
    with pytest.raises(ObjectMissing, match="a/none"):
        access(store)
    store.put_new("a/other", b"1")
    with pytest.raises(ObjectMissing, match="a/none"):
        access(store)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 4, b"0123"), (3, 4, b"3456"), (8, 2, b"89"), (8, 100, b"89"), (10, 5, b""), (99, 5, b""), (4, 0, b"")],
)
def test_read_range_returns_the_bytes_in_the_range(store: Store, start: int, length: int, expected: bytes) -> None:
    store.put_new("digits", b"0123456789")
    assert store.read_range("digits", start, length) == expected


def test_stat_returns_size_and_time(store: Store) -> None:
    store.put_new("a/key", b"12345")
    stat = store.stat("a/key")
    assert (stat.key, stat.size) == ("a/key", 5)
    assert abs(stat.modified - time.time()) < 3600
    assert [(entry.key, entry.size) for entry in store.list("a/")] == [("a/key", 5)]


def test_the_folder_of_an_object_is_not_an_object(store: Store) -> None:
    store.put_new("a/b/c", b"1")
    for access in (store.read, store.stat, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectMissing):
            access("a/b")
    store.delete("a/b")
    assert listed(store, "a/") == ["a/b/c"]


def test_no_object_exists_below_another(store: Store) -> None:
    store.put_new("a", b"1")
    for access in (store.read, store.stat, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectMissing):
            access("a/b")
    store.delete("a/b")
    assert listed(store, "a/") == []
    assert store.read("a").body == b"1"


def test_missing_json_is_none(store: Store) -> None:
    assert read_json(store, "none.json") is None
    store.put_new("some.json", b'{"a": 1}')
    assert read_json(store, "some.json") == {"a": 1}


# Listing


def test_a_listing_contains_exactly_the_prefix(store: Store) -> None:
    names = ["a/b.bin", "a/b/c", "a/b/d/e", "a/bc/d", "a/b-1", "a/c", "ab", "b/a"]
    for name in names:
        store.put_new(name, name.encode())
    for prefix in ["a", "a/", "a/b", "a/b/", "a/b/d", "a/b.", "ab", "a/c", "b/a", "c", "a/x/", "a/c/"]:
        assert listed(store, prefix) == sorted(name for name in names if name.startswith(prefix)), prefix
    assert set(names) < set(listed(store, ""))
    assert all(entry.size == len(entry.key) for entry in store.list("a"))


@pytest.mark.parametrize("prefix", ["/", "/a", "//", "..", "../", "../contract/", "a/../"])
def test_a_prefix_that_no_key_has_lists_nothing(store: Store, prefix: str) -> None:
    store.put_new("a", b"1")
    listed_keys: list[str] = []
    with suppress(ValueError):
        listed_keys = listed(store, prefix)
    assert listed_keys == []


def test_a_listing_of_several_pages_is_complete(store: Store) -> None:
    names = [f"many/{number:04d}" for number in range(1_100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put_new(name, b"1"), names))
    assert listed(store, "many/") == names
    assert listed(store, "many/09") == names[900:1000]


@pytest.mark.parametrize("name", ["a/two words", "a/é", "a/b~", "a/two words/c"])
def test_foreign_objects_are_not_listed(store: Store, name: str) -> None:
    store.put_new("a/key", b"1")
    put_by_hand(store, name)
    assert listed(store, "a/") == ["a/key"]


def put_by_hand(store: Store, name: str) -> None:
    """Put an object past the store, under a name that is not a key."""
    local_path = store.local_path("a/key")
    if local_path:
        path = local_path.parent.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1")
    else:
        bucket, prefix = store.url.removeprefix("s3://").split("/")
        own_client().put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"1")


def test_deleting_a_missing_object_does_nothing(store: Store) -> None:
    store.delete("a/key")
    store.put_new("a/key", b"1")
    store.delete("a/key")
    store.delete("a/key")
    assert listed(store, "a") == []
    with pytest.raises(ObjectMissing):
        store.read("a/key")


# The store itself


def test_the_probe_passes_and_leaves_nothing(store: Store) -> None:
    before = listed(store, "")
    store.probe()
    store.probe()
    assert listed(store, "") == before


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_bad_key_is_refused_by_every_method(store: Store, key: str) -> None:
    before = listed(store, "")
    for access in (
        lambda: store.read(key),
        lambda: store.read_range(key, 0, 1),
        lambda: store.put_new(key, b"1"),
        lambda: store.swap(key, b"1", None),
        lambda: store.stat(key),
        lambda: store.delete(key),
        lambda: store.local_path(key),
    ):
        with pytest.raises(ValueError, match="cannot be part of a key"):
            access()
    assert listed(store, "") == before


def test_a_reopened_store_holds_its_objects(store: Store, url: str) -> None:
    store.put_new("key", b"1")
    assert open_store(url, create=True).read("key").body == b"1"
