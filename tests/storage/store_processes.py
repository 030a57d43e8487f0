"""Processes that use one store at the same time, for the race tests.

They are forked from a server that has already imported boto3, which takes longer than the races.
"""

import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from storage.errors import Conflict, ObjectMissing
from storage.stores import s3  # noqa: F401  # imported before the fork
from storage.stores.opening import open_store
from storage.stores.store import Store

KEYS = [f"race/{index:02d}" for index in range(20)]
INCREMENTS = 5
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__])
Action = Callable[[Store, int, Connection], object]


class Child(NamedTuple):
    """A process that has opened the store and waits for `start`."""

    process: BaseProcess
    connection: Connection

    def start(self) -> None:
        self.connection.send("start")

    def messages(self) -> list[Any]:
        """Everything the process sends until it ends or is killed."""
        received = []
        try:
            while True:
                received.append(self.connection.recv())
        except EOFError:
            return received


@contextmanager
def children(action: Action, url: str, count: int) -> Iterator[list[Child]]:
    """Processes that each run `action(store, number, connection)` after `start` and send its result."""
    started = []
    try:
        for number in range(count):
            ours, theirs = FORKSERVER.Pipe()
            process = FORKSERVER.Process(target=_run, args=(action, url, number, dict(os.environ), theirs))
            process.start()
            theirs.close()
            started.append(Child(process, ours))
        for child in started:
            assert child.connection.recv() == "ready"
        yield started
    finally:
        for child in started:
            child.process.kill()
            child.process.join()
            child.connection.close()


def _run(action: Action, url: str, number: int, environment: dict[str, str], connection: Connection) -> None:
    os.environ |= environment  # the fork server has the environment of the first test
    store = open_store(url)
    connection.send("ready")
    connection.recv()
    connection.send(action(store, number, connection))


def create_keys(store: Store, number: int, _: Connection) -> list[str]:
    """Create all KEYS; returns those that this process created."""
    created = []
    for key in KEYS:
        with suppress(Conflict):
            store.put_new(key, bytes([65 + number]) * 50_000)
            created.append(key)
    return created


def create_keys_by_swap(store: Store, number: int, connection: Connection) -> list[str]:
    """As `create_keys`, with a swap in every second process."""
    if number % 2 == 0:
        return create_keys(store, number, connection)
    created = []
    for key in KEYS:
        with suppress(Conflict):
            store.swap(key, bytes([65 + number]) * 50_000, None)
            created.append(key)
    return created


def increment(store: Store, _: int, __: Connection) -> None:
    """Add 1 to the counter INCREMENTS times."""
    for _ in range(INCREMENTS):
        while True:
            current = store.read("counter")
            try:
                store.swap("counter", str(int(current.body) + 1).encode(), current.etag)
                break
            except Conflict:
                continue


def write_until_killed(store: Store, number: int, connection: Connection) -> None:
    """Put and swap objects of 4 MB that begin with their own sha256; sends "begin" and "done" around each."""
    payload = bytearray(os.urandom(4_000_000))
    try:
        etag: str | None = store.read("pointer").etag
    except ObjectMissing:
        etag = None
    for index in itertools.count():
        payload[:16] = index.to_bytes(8, "big") + number.to_bytes(8, "big")
        body = hashlib.sha256(payload).digest() + payload
        connection.send("begin")
        store.put_new(f"killed/{number:02d}-{index:05d}", body)
        try:
            etag = store.swap("pointer", body, etag)
        except Conflict:  # a server may complete the swap of a dead client
            etag = store.read("pointer").etag
        connection.send("done")
