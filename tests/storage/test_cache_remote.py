"""Shards of a bucket: fetched once to this host, proved, mended when this host's copy rots, brought ahead of time."""

from pathlib import Path

import numpy as np
import pytest

from model.config import RunConfig
from model.loader import GROUP_SHARDS, DataLoader, WindowOrder
from storage import cache as cache_module
from storage import host_cache, keys
from storage.cache import OPEN_SHARDS, ShardCache
from storage.canonical import sha256
from storage.copy import Copying
from storage.errors import ObjectMissing, ShardCorrupt
from storage.layout import open_store
from storage.manifest import Manifest, ShardRow
from storage.store import Store, overwrite
from tests.conftest import S3Url
from tests.making import build_dataset
from tests.model.training import until


class Bucket:
    """A dataset in a bucket, and how often its shards were read."""

    def __init__(self, store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.manifest = store, manifest
        self.rows = list(manifest.rows())
        self.read: list[str] = []
        real = cache_module.read_shard

        def counted(store: Store, dataset: str, shard_id: str, tokens: int, sha256: str) -> bytes | bytearray:
            self.read.append(shard_id)
            return real(store, dataset, shard_id, tokens, sha256)

        monkeypatch.setattr(cache_module, "read_shard", counted)

    def cached(self, row: ShardRow) -> Path:
        return host_cache.FOLDER / row.sha256[:2] / row.sha256


@pytest.fixture
def bucket(config: RunConfig, store: Store, s3_url: S3Url, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The dataset of a folder, copied."""
    manifest = build_dataset(config)
    remote = open_store(s3_url("seaweedfs"), create=True)
    copying = Copying(store, remote, "small")
    for row in copying.missing:
        copying.copy_shard(row)
    copying.finish()
    return Bucket(remote, manifest, monkeypatch)


def test_shards_are_read_once_by_all_caches_of_a_host(bucket: Bucket, store: Store) -> None:
    for _ in range(2):
        cache = ShardCache(bucket.store, "small")
        for row in bucket.rows:
            assert cache.open(row).tobytes() == store.read(keys.shard("small", row.shard_id)).body
    assert sorted(bucket.read) == sorted(bucket.manifest.shard_ids)


@pytest.mark.parametrize("harm", ["flipped", "truncated", "odd", "empty", "longer"])
def test_a_copy_that_rotted_is_set_aside_and_fetched_again_once(
    bucket: Bucket, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    row = bucket.rows[0]
    ShardCache(bucket.store, "small").open(row)
    body = bucket.cached(row).read_bytes()
    flipped = body[:50] + bytes([body[50] ^ 1]) + body[51:]
    harmed = {"flipped": flipped, "truncated": body[:-2], "odd": body[:-1], "empty": b"", "longer": body + b"\0\0"}[
        harm
    ]
    bucket.cached(row).write_bytes(harmed)
    assert sha256(ShardCache(bucket.store, "small").open(row).tobytes()) == row.sha256
    assert bucket.read == [row.shard_id] * 2
    assert [path.read_bytes() for path in (host_cache.FOLDER / "quarantine").iterdir()] == [harmed]
    assert row.shard_id in caplog.text


def test_a_disk_that_gives_back_other_bytes_is_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    real = host_cache._write
    monkeypatch.setattr(host_cache, "_write", lambda path, body: real(path, bytes(len(body))))
    with pytest.raises(ShardCorrupt, match=r"the store has it whole.*disk"):
        ShardCache(bucket.store, "small").open(bucket.rows[0])


def test_a_shard_that_is_bad_in_the_store_is_named_with_both_digests_and_the_command(bucket: Bucket) -> None:
    row = bucket.rows[0]
    overwrite(bucket.store, keys.shard("small", row.shard_id), bytes(row.tokens * 2))
    with pytest.raises(ShardCorrupt) as found:
        ShardCache(bucket.store, "small").open(row)
    for fact in (row.shard_id, row.sha256, sha256(bytes(row.tokens * 2)), "gpt2 dataset verify --repair"):
        assert fact in str(found.value)
    assert not bucket.cached(row).exists()


def test_a_shard_is_hashed_at_its_first_open_in_a_process_only(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(cache_module, "sha256", lambda body: hashed.append(1) or sha256(body))
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 1)
    cache = ShardCache(bucket.store, "small")
    for _ in range(3):
        for row in bucket.rows[:3]:
            cache.open(row)
    assert len(hashed) == 3


def test_no_more_files_are_open_than_are_wanted(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 2)
    cache = ShardCache(bucket.store, "small")
    cache.open(bucket.rows[0])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for row in bucket.rows:
        cache.open(row)
    assert len(bucket.rows) > 4
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    assert OPEN_SHARDS > 2 * GROUP_SHARDS  # the shards of a group and of the next one


# Ahead of time


def test_shards_are_brought_in_the_background_one_batch_at_a_time(bucket: Bucket) -> None:
    cache = ShardCache(bucket.store, "small")
    assert cache.prefetch(bucket.rows[:4])
    until(lambda: not cache._coming.is_alive(), "the shards did not come")
    assert bucket.read == bucket.manifest.shard_ids[:4]
    for row in bucket.rows[:4]:
        cache.open(row)
    assert len(bucket.read) == 4
    cache._coming = type("Busy", (), {"is_alive": lambda _: True})()  # type: ignore[assignment]
    assert not cache.prefetch(bucket.rows)


def test_a_failure_in_the_background_is_told_to_whoever_opens_the_shard(bucket: Bucket) -> None:
    row = bucket.rows[0]
    bucket.store.delete(keys.shard("small", row.shard_id))
    cache = ShardCache(bucket.store, "small")
    assert cache.prefetch([row])
    until(lambda: not cache._coming.is_alive(), "it did not end")
    with pytest.raises(ObjectMissing, match=row.shard_id):
        cache.open(row)


def test_a_bucket_gives_the_windows_of_a_folder_and_fetches_what_comes_next(bucket: Bucket, store: Store) -> None:
    shape = {"sequence_tokens": 32, "seed": 5}
    ours, theirs = (DataLoader(place, "small", bucket.manifest, "train", **shape) for place in (bucket.store, store))
    for first in range(0, 400, 40):
        assert np.array_equal(ours.windows(first, 8), theirs.windows(first, 8))


@pytest.mark.parametrize("shards", [3, 8, 9, 20])
def test_what_comes_soon_is_the_rest_of_this_group_and_the_next(shards: int) -> None:
    order = WindowOrder([33 + 64 * (number % 3) for number in range(shards)], 32, seed=3)
    for first in range(0, 2 * order.epoch_windows, 7):
        epoch, place = divmod(first, order.epoch_windows)
        ends = [*order._group_ends(epoch), *(order._group_ends(epoch + 1) + order.epoch_windows)]
        here = next(number for number, end in enumerate(ends) if end > place)
        start = ends[here - 1] if here else 0
        reached = order.locate(epoch * order.epoch_windows + int(start), int(ends[here + 1] - start))[0]
        assert set(order.soon(first)) == set(reached.tolist())
