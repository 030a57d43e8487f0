"""The cache returns the shards of the manifest, or names the damaged one and the command that repairs it."""

import numpy as np
import pytest

from model.config import RunConfig
from storage.cache.shards import ShardCache
from storage.datasets.manifest import Manifest, ShardRow
from storage.digests import sha256
from storage.errors import ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys
from storage.stores.store import Store, overwrite
from tests.damage import flip_bit
from tests.making import build_dataset

COMMAND = "gpt2 dataset verify --repair"


@pytest.fixture
def manifest(config: RunConfig, store: Store) -> Manifest:
    return build_dataset(config)


@pytest.fixture
def row(manifest: Manifest) -> ShardRow:
    return list(manifest.rows())[1]


def replace(store: Store, row: ShardRow, body: bytes) -> None:
    overwrite(store, DatasetKeys("small").shard(row.shard_id), body)


def test_every_shard_is_opened_as_its_token_ids(store: Store, manifest: Manifest) -> None:
    cache = ShardCache(store, "small")
    for row in manifest.rows():
        tokens = cache.open(row)
        assert (tokens.dtype, len(tokens)) == (np.dtype("<u2"), row.tokens)
        assert tokens.tobytes() == store.read(DatasetKeys("small").shard(row.shard_id)).body
        assert tokens[0] == 50256


def test_an_opened_shard_cannot_be_written(store: Store, row: ShardRow) -> None:
    tokens = ShardCache(store, "small").open(row)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_shard_is_opened_once_in_a_process(store: Store, row: ShardRow) -> None:
    cache = ShardCache(store, "small")
    assert cache.open(row) is cache.open(row)


@pytest.mark.parametrize("place", [0, 777, -1])
def test_a_flipped_byte_names_the_shard_both_digests_and_the_command(store: Store, row: ShardRow, place: int) -> None:
    _, damaged_digest = flip_bit(store, DatasetKeys("small").shard(row.shard_id), place)
    with pytest.raises(ShardCorrupt) as error:
        ShardCache(store, "small").open(row)
    for fact in (row.shard_id, "small", row.sha256, damaged_digest, COMMAND):
        assert fact in str(error.value)


@pytest.mark.parametrize("cut", ["empty", "odd", "short", "long"])
def test_a_shard_of_another_size_names_the_shard_both_digests_and_the_command(
    store: Store, row: ShardRow, cut: str
) -> None:
    whole = store.read(DatasetKeys("small").shard(row.shard_id)).body
    body = {"empty": b"", "odd": whole[:-1], "short": whole[:-200], "long": whole + b"\0\0"}[cut]
    replace(store, row, body)
    with pytest.raises(ShardCorrupt) as error:
        ShardCache(store, "small").open(row)
    stated = f"{len(body):,}" if cut == "long" else sha256(body)  # a body that is too long is not read
    for fact in (row.shard_id, row.sha256, stated, COMMAND):
        assert fact in str(error.value)


def test_a_missing_shard_names_the_shard_and_the_command(store: Store, row: ShardRow) -> None:
    store.delete(DatasetKeys("small").shard(row.shard_id))
    with pytest.raises(ObjectMissing) as error:
        ShardCache(store, "small").open(row)
    for fact in (row.shard_id, "small", COMMAND):
        assert fact in str(error.value)


@pytest.mark.parametrize("place", ["a folder", "in a file"])
def test_a_shard_that_is_no_file_names_the_shard_and_the_command(store: Store, row: ShardRow, place: str) -> None:
    path = store.local_path(DatasetKeys("small").shard(row.shard_id))
    assert path is not None
    path.unlink()
    if place == "a folder":
        path.mkdir()
    else:
        path.parent.rename(path.parent.with_name("moved"))
        path.parent.touch()
    with pytest.raises(ObjectMissing, match=COMMAND):
        ShardCache(store, "small").open(row)


def test_a_damaged_shard_opens_after_it_is_repaired(store: Store, row: ShardRow) -> None:
    whole = store.read(DatasetKeys("small").shard(row.shard_id)).body
    replace(store, row, whole[:-2])
    cache = ShardCache(store, "small")
    with pytest.raises(ShardCorrupt):
        cache.open(row)
    replace(store, row, whole)
    assert cache.open(row).tobytes() == whole
