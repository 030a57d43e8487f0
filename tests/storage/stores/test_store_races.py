"""The contract of every kind of store where many act at once or are killed in the act."""

import hashlib
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests.storage.store_kinds import listed

ROOT = Path(__file__).parents[3]
PROCESSES = 8


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


@contextmanager
def processes(script: str, url: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have imported, opened the store and now wait for one line before they start."""
    head = "import sys\nfrom storage.errors import *\nfrom storage.stores.opening import open_store\n"
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
    try:
        etag = store.swap("pointer", body, etag)
    except Conflict:  # a server may end the swap of a client that is dead
        etag = store.read("pointer").etag
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
                process.wait(chance.uniform(0.03, 0.4))
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
