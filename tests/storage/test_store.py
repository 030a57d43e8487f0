"""The contract of every kind of store: a new kind joins by one more entry of `STORES`."""

import hashlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from storage.errors import AlreadyExists, Conflict, ObjectMissing
from storage.layout import open_store
from storage.store import Body, Store, overwrite, read_json

ROOT = Path(__file__).parents[2]
PROCESSES = 8
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


def folder_url(tmp_path: Path) -> str:
    return str(tmp_path / "contract")


STORES: dict[str, Callable[[Path], str]] = {"folder": folder_url}


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    found = STORES[request.param](tmp_path)
    open_store(found, create=True)
    return found


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def listed(store: Store, prefix: str) -> list[str]:
    return [found.key for found in store.list(prefix)]


# Create-only put


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_put_is_read_back(store: Store, kind: Callable[[bytes], Body]) -> None:
    etag = store.put_new("a/b.bin", kind(b"some bytes"))
    assert store.read("a/b.bin") == (b"some bytes", etag)


def test_an_empty_object_is_an_object(store: Store) -> None:
    etag = store.put_new("empty", b"")
    assert store.read("empty") == (b"", etag)
    assert store.stat("empty").size == 0
    assert store.read_range("empty", 0, 10) == b""


def test_a_second_put_is_refused_and_leaves_the_first_bytes(store: Store) -> None:
    etag = store.put_new("key", b"first")
    for body in (b"second", b"first"):
        with pytest.raises(AlreadyExists, match="key"):
            store.put_new("key", body)
    assert store.read("key") == (b"first", etag)


def test_a_deleted_key_can_be_put_again(store: Store) -> None:
    store.put_new("key", b"first")
    store.delete("key")
    store.put_new("key", b"second")
    assert store.read("key").body == b"second"


# Compare-and-swap


def test_swap_replaces_the_object_that_was_read(store: Store) -> None:
    first = store.swap("pointer", b"one", None)
    assert store.read("pointer") == (b"one", first)
    second = store.swap("pointer", b"two", first)
    assert store.read("pointer") == (b"two", second)
    assert store.swap("pointer", b"three", second) != second


def test_swap_takes_the_etag_of_a_put(store: Store) -> None:
    store.swap("key", b"two", store.put_new("key", b"one"))
    assert store.read("key").body == b"two"


def test_swap_with_a_stale_etag_is_a_conflict_and_changes_nothing(store: Store) -> None:
    first = store.swap("pointer", b"one", None)
    second = store.swap("pointer", b"two", first)
    with pytest.raises(Conflict, match="pointer"):
        store.swap("pointer", b"three", first)
    assert store.read("pointer") == (b"two", second)


def test_swap_that_expects_nothing_is_a_conflict_where_something_is(store: Store) -> None:
    store.put_new("key", b"one")
    with pytest.raises(Conflict):
        store.swap("key", b"two", None)
    assert store.read("key").body == b"one"


def test_swap_that_expects_an_object_is_a_conflict_where_nothing_is(store: Store) -> None:
    etag = store.put_new("key", b"one")
    store.delete("key")
    with pytest.raises(Conflict):
        store.swap("key", b"two", etag)
    assert listed(store, "key") == []


def test_overwrite_puts_whatever_was_there(store: Store) -> None:
    overwrite(store, "page", b"one")
    overwrite(store, "page", b"two")
    assert store.read("page").body == b"two"


# Reading


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.read("a/none"),
        lambda store: store.read_range("a/none", 0, 1),
        lambda store: store.stat("a/none"),
    ],
)
def test_a_missing_object_is_named(store: Store, ask: Callable[[Store], object]) -> None:
    with pytest.raises(ObjectMissing, match="a/none"):
        ask(store)
    store.put_new("a/other", b"1")
    with pytest.raises(ObjectMissing, match="a/none"):
        ask(store)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 4, b"0123"), (3, 4, b"3456"), (8, 2, b"89"), (8, 100, b"89"), (10, 5, b""), (99, 5, b""), (4, 0, b"")],
)
def test_read_range_gives_what_lies_there(store: Store, start: int, length: int, expected: bytes) -> None:
    store.put_new("digits", b"0123456789")
    assert store.read_range("digits", start, length) == expected


def test_stat_says_size_and_time(store: Store) -> None:
    store.put_new("a/key", b"12345")
    found = store.stat("a/key")
    assert (found.key, found.size) == ("a/key", 5)
    assert abs(found.modified - time.time()) < 3600
    assert list(store.list("a/")) == [found]


def test_the_folder_of_an_object_is_no_object(store: Store) -> None:
    store.put_new("a/b/c", b"1")
    for ask in (store.read, store.stat, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectMissing):
            ask("a/b")
    store.delete("a/b")
    assert listed(store, "a/") == ["a/b/c"]


def test_nothing_lies_below_an_object(store: Store) -> None:
    store.put_new("a", b"1")
    for ask in (store.read, store.stat, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectMissing):
            ask("a/b")
    store.delete("a/b")
    assert listed(store, "a/") == []
    assert store.read("a").body == b"1"


def test_json_that_is_not_there_is_none(store: Store) -> None:
    assert read_json(store, "none.json") is None
    store.put_new("some.json", b'{"a": 1}')
    assert read_json(store, "some.json") == {"a": 1}


# Listing


def test_a_listing_is_sorted_by_key_and_holds_just_the_prefix(store: Store) -> None:
    names = ["a/b.bin", "a/b/c", "a/b/d/e", "a/bc/d", "a/b-1", "a/c", "ab", "b/a"]
    for name in names:
        store.put_new(name, name.encode())
    for prefix in ["a", "a/", "a/b", "a/b/", "a/b/d", "a/b.", "ab", "a/c", "b/a", "c", "a/x/", "a/c/"]:
        assert listed(store, prefix) == sorted(name for name in names if name.startswith(prefix)), prefix
    assert set(names) < set(listed(store, ""))
    assert all(found.size == len(found.key) for found in store.list("a"))


@pytest.mark.parametrize("prefix", ["/", "/a", "//", "..", "../", "../contract/", "a/../"])
def test_a_prefix_that_no_key_has_lists_nothing(store: Store, prefix: str) -> None:
    store.put_new("a", b"1")
    found: list[str] = []
    with suppress(ValueError):
        found = listed(store, prefix)
    assert found == []


def test_a_listing_of_more_than_a_page_is_whole(store: Store) -> None:
    names = [f"many/{number:04d}" for number in range(1_100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put_new(name, b"1"), names))
    assert listed(store, "many/") == names
    assert listed(store, "many/09") == names[900:1000]


def test_delete_of_what_is_not_there_does_nothing(store: Store) -> None:
    store.delete("a/key")
    store.put_new("a/key", b"1")
    store.delete("a/key")
    store.delete("a/key")
    assert listed(store, "a") == []
    with pytest.raises(ObjectMissing):
        store.read("a/key")


# What the store is


def test_the_probe_passes_and_leaves_nothing(store: Store) -> None:
    before = listed(store, "")
    store.probe()
    store.probe()
    assert listed(store, "") == before


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_bad_key_is_refused_by_every_verb(store: Store, key: str) -> None:
    before = listed(store, "")
    for ask in (
        lambda: store.read(key),
        lambda: store.read_range(key, 0, 1),
        lambda: store.put_new(key, b"1"),
        lambda: store.swap(key, b"1", None),
        lambda: store.stat(key),
        lambda: store.delete(key),
        lambda: store.local_path(key),
    ):
        with pytest.raises(ValueError, match="cannot be part of a key"):
            ask()
    assert listed(store, "") == before


def test_opening_again_finds_what_was_put(store: Store, url: str) -> None:
    store.put_new("key", b"1")
    assert open_store(url, create=True).read("key").body == b"1"


# Races


@contextmanager
def processes(script: str, url: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have imported, opened the store and now wait for one line before they start."""
    head = "import sys\nfrom storage.errors import *\nfrom storage.layout import open_store\n"
    start = "store, me = open_store(sys.argv[1]), int(sys.argv[2])\nprint('ready', flush=True)\ninput()\n"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", head + start + script, url, str(number)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout and process.stdout.readline() == "ready\n"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def race(script: str, url: str) -> list[str]:
    """What each of eight processes printed that started at once."""
    with processes(script, url, PROCESSES) as started:
        for process in started:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        printed = [process.communicate()[0] for process in started]
        assert [process.returncode for process in started] == [0] * PROCESSES
    return printed


CREATE = """
import json
won = []
for number in range(50):
    try:
        if me % 2 and SWAP:
            store.swap(f"race/{number:02d}", bytes([65 + me]) * 50_000, None)
        else:
            store.put_new(f"race/{number:02d}", bytes([65 + me]) * 50_000)
        won.append(f"race/{number:02d}")
    except (AlreadyExists, Conflict):
        pass
print(json.dumps(won))
"""


@pytest.mark.parametrize("swap", [False, True], ids=["puts", "puts and swaps"])
def test_of_eight_processes_that_create_a_key_one_wins(store: Store, url: str, swap: bool) -> None:
    won = [json.loads(printed) for printed in race(CREATE.replace("SWAP", str(swap)), url)]
    winner = {key: number for number, keys_won in enumerate(won) for key in keys_won}
    assert sorted(key for keys_won in won for key in keys_won) == [f"race/{number:02d}" for number in range(50)]
    for key, number in winner.items():
        assert store.read(key).body == bytes([65 + number]) * 50_000
    assert listed(store, "race/") == sorted(winner)


COUNT = """
for _ in range(10):
    while True:
        found = store.read("counter")
        try:
            store.swap("counter", str(int(found.body) + 1).encode(), found.etag)
            break
        except Conflict:
            pass
"""


def test_eight_processes_that_count_by_swaps_lose_none(store: Store, url: str) -> None:
    store.put_new("counter", b"0")
    race(COUNT, url)
    assert store.read("counter").body == b"80"


def test_a_reader_sees_one_version_whole_while_it_is_swapped(store: Store) -> None:
    store.put_new("page", b"A" * 500_000)
    finished = threading.Event()

    def write() -> None:
        with_letter = (bytes([65 + number % 26]) * (500_000 + number) for number in range(1, 40))
        for body in with_letter:
            overwrite(store, "page", body)
        finished.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        seen = set()
        while not finished.is_set() and not writing.done():
            body = store.read("page").body
            seen.add(len(body))
            assert body == body[:1] * len(body)
            assert body[0] == 65 + (len(body) - 500_000) % 26
        writing.result()
    assert store.read("page").body == b"N" * 500_039


WRITE = """
import hashlib, itertools, os
payload = bytearray(os.urandom(4_000_000))
try:
    etag = store.read("pointer").etag
except ObjectMissing:
    etag = None
for number in itertools.count():
    payload[:16] = number.to_bytes(8, "big") + me.to_bytes(8, "big")
    body = hashlib.sha256(payload).digest() + payload
    print("begin", flush=True)
    store.put_new(f"killed/{me:02d}-{number:05d}", body)
    etag = store.swap("pointer", body, etag)
    print("done", flush=True)
"""


def test_kill_9_at_any_instant_leaves_whole_objects_only(store: Store, url: str) -> None:
    chance = random.Random(9)
    caught = 0
    with processes(WRITE, url, 15) as started:
        for process in started:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.03, 0.15))
            process.kill()
            printed = process.communicate()[0].split()
            caught += printed.count("begin") - printed.count("done")
    found = listed(store, "killed/")
    assert found, "no process came so far as to write an object"
    assert caught, "no process was killed in the middle of a write"
    for key in [*found, "pointer"]:
        body = store.read(key).body
        assert len(body) == 4_000_032
        assert hashlib.sha256(body[32:]).digest() == body[:32], key
    store.swap("pointer", b"no dead process holds a lock", store.read("pointer").etag)
