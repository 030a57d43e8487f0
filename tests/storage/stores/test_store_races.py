"""The contract of every kind of store under concurrent and killed processes."""

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests.storage.store_kinds import listed
from tests.storage.store_processes import (
    INCREMENTS,
    KEYS,
    Action,
    children,
    create_keys,
    create_keys_by_swap,
    increment,
    write_until_killed,
)

PROCESSES = 8


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def race(action: Action, url: str) -> list[Any]:
    """The results of eight processes that start at the same time."""
    with children(action, url, PROCESSES) as started:
        for child in started:
            child.start()
        return [result for child in started for result in child.messages()]


@pytest.mark.parametrize("action", [create_keys, create_keys_by_swap])
def test_one_of_eight_processes_that_create_a_key_wins(store: Store, url: str, action: Action) -> None:
    created = race(action, url)
    assert len(created) == PROCESSES
    winner = {key: number for number, own_keys in enumerate(created) for key in own_keys}
    assert sorted(key for own_keys in created for key in own_keys) == KEYS
    for key, number in winner.items():
        assert store.read(key).body == bytes([65 + number]) * 50_000
    assert listed(store, "race/") == sorted(winner)


def test_eight_processes_that_count_by_swaps_lose_no_update(store: Store, url: str) -> None:
    store.put_new("counter", b"0")
    race(increment, url)
    assert int(store.read("counter").body) == PROCESSES * INCREMENTS


def test_a_reader_sees_whole_versions_during_swaps(store: Store) -> None:
    store.put_new("page", b"A" * 500_000)
    finished = threading.Event()

    def write() -> None:
        with_letter = (bytes([65 + number % 26]) * (500_000 + number) for number in range(1, 40))
        for body in with_letter:
            overwrite(store, "page", body)
        finished.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not finished.is_set() and not writing.done():
            body = store.read("page").body
            assert body == body[:1] * len(body)
            assert body[0] == 65 + (len(body) - 500_000) % 26
        writing.result()
    assert store.read("page").body == b"N" * 500_039


def test_kill_9_leaves_only_whole_objects(store: Store, url: str) -> None:
    """Each process is killed at a random time after its first complete write, or during it in every third process."""
    rng = random.Random(9)
    interrupted = 0
    with children(write_until_killed, url, 15) as started:
        for number, child in enumerate(started):
            child.start()
            messages = [child.connection.recv() for _ in range(1 if number % 3 else 2)]
            child.process.join(rng.uniform(0.0, 0.1))
            assert child.process.is_alive()
            child.process.kill()
            messages += child.messages()
            interrupted += messages.count("begin") - messages.count("done")
    written = listed(store, "killed/")
    assert written, "no process wrote an object before it was killed"
    assert interrupted, "no process was killed in the middle of a write"
    for key in [*written, "pointer"]:
        body = store.read(key).body
        assert len(body) == 4_000_032
        assert hashlib.sha256(body[32:]).digest() == body[:32], key
    store.swap("pointer", b"no dead process holds a lock", store.read("pointer").etag)
