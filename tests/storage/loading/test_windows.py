"""Windows hold the tokens of the shards, and a damaged or missing shard is named."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from model.config import RunConfig
from storage.datasets.manifest import Manifest
from storage.digests import sha256
from storage.errors import ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys
from storage.loading.windows import Windows
from storage.stores.store import Store
from tests.storage.loading.orders import pairs, put_dataset


@pytest.fixture
def built(config: RunConfig, build: Callable[[RunConfig], Manifest]) -> tuple[RunConfig, Manifest]:
    return config, build(config)


def test_windows_hold_the_tokens_of_the_shards(store: Store, built: tuple[RunConfig, Manifest]) -> None:
    _, manifest = built
    split = Windows(store, "small", manifest, "train", sequence_tokens=32, seed=9)
    files = [
        np.fromfile(str(store.local_path(DatasetKeys("small").shard(row.shard_id))), "<u2")
        for row in manifest.rows("train")
    ]
    windows = split.read(0, split.order.epoch_windows)
    assert windows.shape == (split.order.epoch_windows, 33)
    assert windows.dtype == np.uint16
    for tokens, (shard, window) in zip(windows, pairs(split.order, 0, len(windows)), strict=True):
        assert np.array_equal(tokens, files[shard][window * 32 : window * 32 + 33])


def test_neighbouring_windows_share_one_token_and_cover_the_shard_except_its_tail(store: Store) -> None:
    manifest, shards = put_dataset(store, [1, 75, 10, 40])
    split = Windows(store, "synthetic", manifest, "train", sequence_tokens=10, seed=0)
    windows = split.read_in_file_order(np.arange(split.order.epoch_windows))
    assert np.array_equal(windows[:7, :-1].ravel(), shards[1][:70])
    assert np.array_equal(windows[7:, :-1].ravel(), shards[3][:30])
    for before, after in pairwise(windows[:7]):
        assert before[-1] == after[0]
    assert split.tokens == 126


def test_file_order_returns_the_requested_windows(store: Store) -> None:
    manifest, _ = put_dataset(store, [31, 1, 21, 0, 41])
    split = Windows(store, "synthetic", manifest, "train", sequence_tokens=10, seed=0)
    windows = split.read_in_file_order(np.arange(9))
    chosen = np.array([8, 0, 3, 5, 3])
    assert np.array_equal(split.read_in_file_order(chosen), windows[chosen])


def test_splits_do_not_mix(store: Store, built: tuple[RunConfig, Manifest]) -> None:
    _, manifest = built
    train, val = (Windows(store, "small", manifest, split, sequence_tokens=8, seed=0) for split in ("train", "val"))
    assert train.tokens + val.tokens == sum(row.tokens for row in manifest.rows())
    assert val.tokens == sum(row.tokens for row in list(manifest.rows())[:2])


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_shard_is_refused(store: Store, damage: str) -> None:
    manifest, shards = put_dataset(store, [100])
    path = store.local_path(DatasetKeys("synthetic").shard("shard-0"))
    assert path is not None
    body = bytearray(shards[0].tobytes())
    body[50] ^= 1
    path.write_bytes({"flipped": bytes(body), "short": bytes(body[:100]), "empty": b""}[damage])
    split = Windows(store, "synthetic", manifest, "train", sequence_tokens=10, seed=0)
    with pytest.raises(ShardCorrupt) as caught:
        split.read(0, 1)
    for fact in ("shard-0", manifest.columns["sha256"][0], sha256(path.read_bytes())):
        assert fact in str(caught.value)


def test_a_missing_shard_is_named(store: Store) -> None:
    manifest, _ = put_dataset(store, [100])
    store.delete(DatasetKeys("synthetic").shard("shard-0"))
    with pytest.raises(ObjectMissing, match="shard-0"):
        Windows(store, "synthetic", manifest, "train", sequence_tokens=10, seed=0).read(0, 1)
