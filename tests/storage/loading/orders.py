"""Shards of chosen sizes, and their windows enumerated one by one."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from model import tokenizer
from storage.datasets.manifest import Manifest, ShardRow
from storage.digests import sha256
from storage.keys import DatasetKeys
from storage.loading.order import WindowOrder
from storage.stores.store import Store

SIZES = st.lists(st.integers(0, 120), min_size=1, max_size=30)
SEQUENCES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32)


def pairs(order: WindowOrder, first: int, count: int) -> list[tuple[int, int]]:
    shard_of, window_of = order.locate(first, count)
    return list(zip(shard_of.tolist(), window_of.tolist(), strict=True))


def windows_of(sizes: list[int], sequence_tokens: int) -> list[tuple[int, int]]:
    """Every window of the shards, enumerated one by one while T + 1 tokens are left."""
    return [
        (shard, start // sequence_tokens)
        for shard, size in enumerate(sizes)
        for start in range(0, size, sequence_tokens)
        if start + sequence_tokens + 1 <= size
    ]


def put_dataset(store: Store, sizes: list[int], dataset: str = "synthetic") -> tuple[Manifest, list[np.ndarray]]:
    """Store shards of exactly these sizes, without a source. Each token id is its position."""
    columns: dict[str, list[Any]] = {name: [] for name in ShardRow._fields}
    shards, start = [], 0
    for index, size in enumerate(sizes):
        ids = np.arange(start, start + size).astype("<u2")
        start += size
        shards.append(ids)
        store.put_new(DatasetKeys(dataset).shard(f"shard-{index}"), ids.tobytes())
        row = (f"shard-{index}", size, 1, 0, size, sha256(ids.tobytes()), "train", 0)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return Manifest("0" * 64, {}, tokenizer.identity(), {}, {}, None, columns), shards
