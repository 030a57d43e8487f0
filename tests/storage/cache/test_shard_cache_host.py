"""Shards of an S3 store are read through the host's cache: fetched once, verified once, and named if damaged."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.cache import host as host_cache
from storage.cache import shards as shard_cache
from storage.cache.shards import OPEN_SHARDS, ShardCache
from storage.datasets.manifest import ShardRow
from storage.digests import sha256
from storage.errors import ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Body, Object, Store, overwrite
from tests.conftest import S3Url
from tests.polling import poll

ROOT = Path(__file__).parents[3]
COMMAND = "gpt2 dataset verify --repair"

# Opens a shard as training does, and logs each read from the store.
PROCESS = """
import sys
from storage.cache import shards
from storage.digests import sha256
from storage.stores.opening import open_store
from storage.datasets.manifest import ShardRow

url, log, shard_id, tokens, digest = sys.argv[1:]
read = shards.read_shard

def logged(store, dataset, row):
    with open(log, "a") as file:
        file.write(row.shard_id + "\\n")
    return read(store, dataset, row)

shards.read_shard = logged
opened = shards.ShardCache(open_store(url), "small")
print("ready", flush=True)
sys.stdin.readline()
print(sha256(opened.open(ShardRow(shard_id, int(tokens), 1, 0, 1, digest, "train")).data), flush=True)
"""


@pytest.fixture
def store(s3_url: S3Url) -> Store:
    return open_store(s3_url("seaweedfs"), create=True)


MakeRows = Callable[[int], list[ShardRow]]


@pytest.fixture
def rows(store: Store) -> MakeRows:
    """A function that puts a number of small shards and returns their rows."""

    def put(count: int) -> list[ShardRow]:
        rows = []
        for number in range(count):
            body = np.arange(number, number + 500).astype("<u2").tobytes()
            store.put_new(DatasetKeys("small").shard(f"shard-{number}"), body)
            rows.append(ShardRow(f"shard-{number}", 500, 1, 0, 500, sha256(body), "train"))
        return rows

    return put


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that were read from the store."""
    shard_ids: list[str] = []
    read = shard_cache.read_shard

    def logged(store: Store, dataset: str, row: ShardRow) -> Body:
        shard_ids.append(row.shard_id)
        return read(store, dataset, row)

    monkeypatch.setattr(shard_cache, "read_shard", logged)
    return shard_ids


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the shards that a cache has hashed."""
    sizes: list[int] = []

    def counted(body: memoryview) -> str:
        sizes.append(body.nbytes)
        return sha256(body)

    monkeypatch.setattr(shard_cache, "sha256", counted)
    return sizes


def place(row: ShardRow) -> Path:
    return host_cache.FOLDER / row.sha256[:2] / row.sha256


def cached_files() -> list[Path]:
    return sorted(path for path in host_cache.FOLDER.rglob("*") if path.is_file())


def mapped_files() -> int:
    """The number of cached files that this process has open."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            count += descriptor.readlink().is_relative_to(host_cache.FOLDER)
        except FileNotFoundError:
            continue  # the descriptor that lists this folder
    return count


def is_intact(tokens: np.ndarray, row: ShardRow) -> bool:
    return sha256(tokens.tobytes()) == row.sha256


# Fetched and verified once


def test_processes_that_open_the_same_shard_download_it_once(store: Store, rows: MakeRows, tmp_path: Path) -> None:
    row = rows(1)[0]
    argv = [store.url, str(tmp_path / "log"), row.shard_id, str(row.tokens), row.sha256]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *argv], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0].strip() for process in processes] == [row.sha256] * 4
    assert (tmp_path / "log").read_text().splitlines() == [row.shard_id]
    assert is_intact(ShardCache(store, "small").open(row), row)


def test_a_process_hashes_a_shard_once_even_if_it_was_closed_in_between(
    store: Store, rows: MakeRows, hashed: list[int], reads: list[str]
) -> None:
    put_rows = rows(OPEN_SHARDS + 5)
    opened = ShardCache(store, "small")
    for row in [*put_rows, *put_rows[:3]]:
        assert is_intact(opened.open(row), row)
    assert len(hashed) == len(put_rows)
    assert len(reads) == len(put_rows)
    reopened = ShardCache(store, "small")
    assert is_intact(reopened.open(put_rows[0]), put_rows[0])
    assert len(hashed) == len(put_rows) + 1
    assert len(reads) == len(put_rows)


def test_the_number_of_open_files_is_limited(store: Store, rows: MakeRows) -> None:
    opened = ShardCache(store, "small")
    counts = []
    for row in rows(OPEN_SHARDS + 8):
        opened.open(row)
        counts.append(mapped_files())
    assert counts == [min(number, OPEN_SHARDS) for number in range(1, OPEN_SHARDS + 9)]


# Damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda body: bytes([body[0] ^ 1]) + body[1:],
    "truncated": lambda body: body[:-2],
    "empty": lambda body: body[:0],
    "longer": lambda body: body + b"\0\0",
    "odd": lambda body: body[:-1],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_cache_is_quarantined_logged_and_fetched_again(
    store: Store, rows: MakeRows, reads: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    row = rows(1)[0]
    assert is_intact(ShardCache(store, "small").open(row), row)
    damaged = DAMAGES[damage](place(row).read_bytes())
    place(row).write_bytes(damaged)
    opened = ShardCache(store, "small")
    with caplog.at_level(logging.WARNING, "storage.cache"):
        assert is_intact(opened.open(row), row)
    assert [row.shard_id in record.getMessage() for record in caplog.records] == [True]
    assert reads == [row.shard_id] * 2
    quarantined = host_cache.HostCache(host_cache.FOLDER, 0).quarantined()
    assert [path.read_bytes() for path in quarantined] == [damaged]
    assert is_intact(ShardCache(store, "small").open(row), row)
    assert len(reads) == 2


def test_a_disk_that_returns_wrong_bytes_is_named(
    store: Store, rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = rows(1)[0]
    write = host_cache._write
    monkeypatch.setattr(host_cache, "_write", lambda path, body: write(path, DAMAGES["flipped"](bytes(body))))
    with pytest.raises(ShardCorrupt, match=rf"{row.shard_id}.*this host's disk"):
        ShardCache(store, "small").open(row)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_damaged_in_the_store_is_named_and_not_cached(store: Store, rows: MakeRows, damage: str) -> None:
    row = rows(1)[0]
    key = DatasetKeys("small").shard(row.shard_id)
    body = DAMAGES[damage](bytes(store.read(key).body))
    overwrite(store, key, body)
    opened = ShardCache(store, "small")
    with pytest.raises(ShardCorrupt) as error:
        opened.open(row)
    stated = f"{len(body):,}" if damage == "longer" else sha256(body)  # a body that is too long is not read
    for fact in (row.shard_id, "small", row.sha256, stated, COMMAND):
        assert fact in str(error.value)
    assert cached_files() == []
    overwrite(store, key, np.arange(500).astype("<u2").tobytes())
    assert is_intact(opened.open(row), row)


def test_bytes_damaged_in_transit_are_fetched_again(
    store: Store, rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the server keeps no checksum, only the reader can detect this."""
    row = rows(1)[0]
    read = store.read
    flipped = DAMAGES["flipped"](bytes(read(DatasetKeys("small").shard(row.shard_id)).body))
    damaged = [Object(flipped, "", sha256(flipped))]
    monkeypatch.setattr(store, "read", lambda key, limit_bytes: damaged.pop() if damaged else read(key, limit_bytes))
    assert is_intact(ShardCache(store, "small").open(row), row)
    assert damaged == []


# Prefetching


def test_one_list_of_shards_at_a_time_is_prefetched(
    store: Store, rows: MakeRows, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_rows = rows(4)
    go_on, counting = threading.Event(), shard_cache.read_shard

    def waiting(store: Store, dataset: str, row: ShardRow) -> Body:
        assert go_on.wait(60)
        return counting(store, dataset, row)

    monkeypatch.setattr(shard_cache, "read_shard", waiting)
    opened = ShardCache(store, "small")
    assert opened.prefetch(put_rows[:3])
    assert not opened.prefetch(put_rows)
    assert cached_files() == []
    go_on.set()
    poll(lambda: [path for path in cached_files() if path.name != "part"] == sorted(map(place, put_rows[:3])))
    poll(lambda: opened.prefetch(put_rows))
    poll(lambda: place(put_rows[3]).exists())
    assert reads == [row.shard_id for row in put_rows]
    for row in put_rows:
        assert is_intact(opened.open(row), row)
    assert len(reads) == len(put_rows)


def test_an_error_of_prefetching_is_raised_when_the_shard_is_opened(store: Store, rows: MakeRows) -> None:
    put_rows = rows(3)
    store.delete(DatasetKeys("small").shard(put_rows[1].shard_id))
    overwrite(store, DatasetKeys("small").shard(put_rows[2].shard_id), b"damaged!")
    opened = ShardCache(store, "small")
    assert opened.prefetch(put_rows[1:])
    poll(lambda: opened.prefetch(put_rows[2:]))
    poll(lambda: opened.prefetch(put_rows[:1]))
    poll(lambda: place(put_rows[0]).exists())
    with pytest.raises(ObjectMissing, match=put_rows[1].shard_id):
        opened.open(put_rows[1])
    with pytest.raises(ShardCorrupt, match=put_rows[2].shard_id):
        opened.open(put_rows[2])
    assert is_intact(opened.open(put_rows[0]), put_rows[0])


def test_a_cache_smaller_than_the_dataset_still_opens_all_shards(
    store: Store, rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "OPEN_SHARDS", 2)
    opened = ShardCache(store, "small", limit_bytes=3_000)  # three shards
    for row in rows(12) * 2:
        assert is_intact(opened.open(row), row)
        assert len(cached_files()) <= 3
