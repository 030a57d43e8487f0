"""The windows of a dataset's split, read through this host's shard cache. Tokenises nothing."""

import numpy as np

from storage.cache.shards import LIMIT_BYTES, ShardCache
from storage.datasets.manifest import Manifest, ShardRow
from storage.loading.order import WindowOrder
from storage.stores.store import Store


class Windows:
    """The windows of one split, read through this host's shard cache."""

    def __init__(
        self, store: Store, dataset: str, manifest: Manifest, split: str, *, sequence_tokens: int, seed: int,
        cache_bytes: int = LIMIT_BYTES,
    ) -> None:  # fmt: skip
        self._rows: list[ShardRow] = list(manifest.rows(split))
        self._cache = ShardCache(store, dataset, cache_bytes)
        self._prefetched: list[int] = []
        self.sequence_tokens = sequence_tokens
        self.tokens = sum(row.tokens for row in self._rows)
        self.order = WindowOrder([row.tokens for row in self._rows], sequence_tokens, seed)

    def read(self, first: int, count: int) -> np.ndarray:
        """`count` windows of the stream from `first` on, uint16, count x (T + 1)."""
        upcoming = self.order.upcoming_shards(first)
        if upcoming != self._prefetched and self._cache.prefetch([self._rows[shard] for shard in upcoming]):
            self._prefetched = upcoming
        return self._gather(*self.order.locate(first, count))

    def read_in_file_order(self, chosen: np.ndarray) -> np.ndarray:
        """Windows `chosen` of the split, counted shard by shard, uint16, len(chosen) x (T + 1)."""
        return self._gather(*self.order.in_file_order(chosen))

    def shards_of(self, first: int, count: int) -> list[str]:
        """The ids of the shards that hold `count` windows of the stream from `first` on."""
        shard_of, _ = self.order.locate(first, count)
        return [self._rows[shard].shard_id for shard in np.unique(shard_of)]

    def _gather(self, shard_of: np.ndarray, window_of: np.ndarray) -> np.ndarray:
        tokens = np.empty((len(shard_of), self.sequence_tokens + 1), np.uint16)
        for shard in np.unique(shard_of):
            of_shard = shard_of == shard
            ids = self._cache.open(self._rows[shard])
            views = np.lib.stride_tricks.sliding_window_view(ids, self.sequence_tokens + 1)
            tokens[of_shard] = views[window_of[of_shard] * self.sequence_tokens]
        return tokens
