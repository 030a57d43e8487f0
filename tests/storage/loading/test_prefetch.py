"""A loader reads the same windows from S3 as from a folder, and prefetches the shards of the next group."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import RunConfig
from storage.cache import host as host_cache
from storage.cache.shards import ShardCache
from storage.datasets.copy import copy_dataset
from storage.datasets.manifest import Manifest, ShardRow
from storage.digests import sha256
from storage.keys import DatasetKeys
from storage.loading import order as order_module
from storage.loading.order import GROUP_SHARDS, WindowOrder
from storage.loading.windows import Windows
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.conftest import S3Url
from tests.making import build_dataset
from tests.polling import poll

T = 32


def loader_of(store: Store, manifest: Manifest, seed: int = 7) -> Windows:
    return Windows(store, "small", manifest, "train", sequence_tokens=T, seed=seed)


def groups(order: WindowOrder, sizes: list[int], epoch: int, seed: int) -> list[list[int]]:
    """The groups of an epoch that hold a window: all shards shuffled, in groups of GROUP_SHARDS."""
    shuffled = order_module._shuffled(len(sizes), seed, epoch).tolist()
    cut = [shuffled[at : at + GROUP_SHARDS] for at in range(0, len(shuffled), GROUP_SHARDS)]
    return [group for group in cut if any(order.windows_of_shard[shard] for shard in group)]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 120), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 9), st.integers(0, 300)
)
def test_upcoming_shards_are_those_of_the_current_and_the_next_group_across_epochs(
    sizes: list[int], sequence_tokens: int, seed: int, first: int
) -> None:
    if max(sizes) <= sequence_tokens:
        return
    order = WindowOrder(sizes, sequence_tokens, seed)
    epoch, place = divmod(first, order.epoch_windows)
    coming = [group for number in (epoch, epoch + 1) for group in groups(order, sizes, number, seed)]
    coming += groups(order, sizes, epoch + 2, seed)
    counts = [int(order.windows_of_shard[group].sum()) for group in coming]
    at = 0
    while place >= counts[at]:
        place -= counts[at]
        at += 1
    assert order.upcoming_shards(first) == coming[at] + coming[at + 1]
    shards, _ = order.locate(first, counts[at] - place + counts[at + 1])
    assert set(shards.tolist()) <= set(order.upcoming_shards(first))
    from_the_start, _ = order.locate(first - place, counts[at] + counts[at + 1])
    assert set(from_the_start.tolist()) == {
        shard for shard in order.upcoming_shards(first) if order.windows_of_shard[shard]
    }


def test_a_loader_reads_the_same_windows_from_s3_as_from_a_folder(
    config: RunConfig, store: Store, s3_url: S3Url
) -> None:
    manifest = build_dataset(config)
    remote = open_store(s3_url("seaweedfs"), create=True)
    copy_dataset(store, remote, "small")
    ours, theirs = loader_of(store, manifest), loader_of(remote, manifest)
    for first in range(0, 2 * ours.order.epoch_windows, 50):
        assert np.array_equal(ours.read(first, 50), theirs.read(first, 50))
    chosen = np.arange(0, ours.order.epoch_windows, 3)
    assert np.array_equal(ours.read_in_file_order(chosen), theirs.read_in_file_order(chosen))


def test_the_next_group_is_fetched_before_it_is_read(s3_url: S3Url, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_url("seaweedfs"), create=True)
    rows = []
    for number in range(3 * GROUP_SHARDS):
        body = np.arange(number, number + 3 * T + 1).astype("<u2").tobytes()
        store.put_new(DatasetKeys("small").shard(f"shard-{number}"), body)
        rows.append(ShardRow(f"shard-{number}", 3 * T + 1, 1, 0, 1, sha256(body), "train"))
    columns = {name: list(values) for name, values in zip(ShardRow._fields, zip(*rows, strict=True), strict=True)}
    reading = loader_of(store, Manifest("0" * 64, {}, {}, {}, {}, None, columns))
    prefetched: list[list[str]] = []
    prefetch = ShardCache.prefetch

    def recording(self: ShardCache, shard_rows: list[ShardRow]) -> bool:
        prefetched.append([row.shard_id for row in shard_rows])
        return prefetch(self, shard_rows)

    monkeypatch.setattr(ShardCache, "prefetch", recording)

    def cached() -> set[str]:
        return {row.shard_id for row in rows if place(row).exists()}

    def place(row: ShardRow) -> Path:
        return host_cache.FOLDER / row.sha256[:2] / row.sha256

    for group in range(6):  # two epochs
        first = group * GROUP_SHARDS * 3
        upcoming = [rows[shard].shard_id for shard in reading.order.upcoming_shards(first)]
        assert len(upcoming) == 2 * GROUP_SHARDS
        poll(lambda first=first, upcoming=upcoming: reading.read(first, 1) is not None and cached() >= set(upcoming))
        assert prefetched[-1] == upcoming
        prefetches = len(prefetched)
        reading.read(first + 1, GROUP_SHARDS)
        assert len(prefetched) == prefetches  # one prefetch for each group
        if group == 0:
            assert cached() == set(upcoming)
