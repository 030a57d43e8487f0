"""The windows of a dataset's split or of a mix, read through this host's shard cache."""

import numpy as np

from storage.cache.shards import LIMIT_BYTES, ShardCache
from storage.datasets.manifest import Manifest, ShardRow, read_manifest
from storage.loading.mix import MixedOrder, Share
from storage.loading.order import WindowOrder
from storage.stores.store import Store


class Windows:
    """The windows of one split, read through this host's shard cache."""

    def __init__(
        self, store: Store, dataset: str, manifest: Manifest, split: str, *, sequence_tokens: int, seed: int,
        cache_bytes: int = LIMIT_BYTES,
    ) -> None:  # fmt: skip
        self.manifest = manifest
        self.rows: list[ShardRow] = list(manifest.rows(split))
        self.cache = ShardCache(store, dataset, cache_bytes)
        self._prefetched: list[int] = []
        self.sequence_tokens = sequence_tokens
        self.tokens = sum(row.tokens for row in self.rows)
        self.order = WindowOrder([row.tokens for row in self.rows], sequence_tokens, seed)

    def read(self, first: int, count: int) -> np.ndarray:
        """`count` windows of the stream from `first` on, uint16, count x (T + 1)."""
        tokens = np.empty((count, self.sequence_tokens + 1), np.uint16)
        self.read_into(tokens, np.arange(count), first)
        return tokens

    def read_into(self, tokens: np.ndarray, places: np.ndarray, first: int) -> None:
        """Read the windows of the stream from `first` on into the rows `places` of `tokens`."""
        upcoming = self.order.upcoming_shards(first)
        if upcoming != self._prefetched and self.cache.prefetch([self.rows[shard] for shard in upcoming]):
            self._prefetched = upcoming
        self._gather(tokens, places, *self.order.locate(first, len(places)))

    def read_in_file_order(self, chosen: np.ndarray) -> np.ndarray:
        """Windows `chosen` of the split, counted shard by shard, uint16, len(chosen) x (T + 1)."""
        tokens = np.empty((len(chosen), self.sequence_tokens + 1), np.uint16)
        self._gather(tokens, np.arange(len(chosen)), *self.order.in_file_order(chosen))
        return tokens

    def _gather(self, tokens: np.ndarray, places: np.ndarray, shard_of: np.ndarray, window_of: np.ndarray) -> None:
        for shard in np.unique(shard_of):
            of_shard = np.flatnonzero(shard_of == shard)
            ids = self.cache.open(self.rows[shard])
            shape, width = (int(self.order.windows_of_shard[shard]), self.sequence_tokens + 1), ids.itemsize
            windows = np.ndarray(shape, ids.dtype, ids, strides=(self.sequence_tokens * width, width))  # copies nothing
            tokens[places[of_shard]] = windows[window_of[of_shard]]


class MixedWindows:
    """The windows of one split of several datasets, mixed by weight. Those of a single dataset are in its own order."""

    def __init__(self, store: Store, mix: dict[str, Share], split: str, **settings: int) -> None:
        """`settings`: those of Windows."""
        self.order, self._sequence_tokens = MixedOrder(mix), settings["sequence_tokens"]
        versions = {dataset: read_manifest(store, dataset, share.manifest) for dataset, share in mix.items()}
        self.splits = {name: Windows(store, name, version, split, **settings) for name, version in versions.items()}

    def read(self, first: int, count: int) -> np.ndarray:
        tokens = np.empty((count, self._sequence_tokens + 1), np.uint16)
        for dataset, start, places in self.order.parts(first, count):
            self.splits[dataset].read_into(tokens, places, start)
        return tokens

    def shards_of(self, first: int, count: int) -> list[str]:
        """The ids of the shards that hold `count` windows of the stream from `first` on."""
        shards = []
        for dataset, start, places in self.order.parts(first, count):
            split = self.splits[dataset]
            shards += [split.rows[shard].shard_id for shard in np.unique(split.order.locate(start, len(places))[0])]
        return shards

    def epochs(self, windows: int) -> dict[str, float]:
        """How often the first `windows` windows of the stream pass through each dataset."""
        counts = zip(self.splits.items(), self.order.counts(windows).tolist(), strict=True)
        return {dataset: count / split.order.epoch_windows for (dataset, split), count in counts}
