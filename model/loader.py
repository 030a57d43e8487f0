"""From a manifest to batches: windows of the global order, of which each rank takes its slice. Tokenises nothing."""

import numpy as np
import torch
from torch import Tensor

from model.order import WindowOrder
from storage.cache import ShardCache
from storage.manifest import Manifest, ShardRow
from storage.store import Store


class DataLoader:
    """Batches of one split as this rank sees them."""

    def __init__(
        self, store: Store, dataset: str, manifest: Manifest, split: str, *, sequence_tokens: int, seed: int
    ) -> None:
        self._rows: list[ShardRow] = list(manifest.rows(split))
        self._cache = ShardCache(store, dataset)
        self.sequence_tokens = sequence_tokens
        self._soon: list[int] = []
        self.tokens = sum(row.tokens for row in self._rows)
        self.order = WindowOrder([row.tokens for row in self._rows], sequence_tokens, seed)

    def windows(self, first: int, count: int) -> np.ndarray:
        """Windows `first` to `first + count` of the stream, uint16, count x (T + 1)."""
        soon = self.order.soon(first)
        if soon != self._soon and self._cache.prefetch([self._rows[shard] for shard in soon]):
            self._soon = soon
        return self._gather(*self.order.locate(first, count))

    def windows_in_file_order(self, chosen: np.ndarray) -> np.ndarray:
        """The chosen windows of the split counted shard by shard, uint16, len(chosen) x (T + 1)."""
        return self._gather(*self.order.in_file_order(chosen))

    def _gather(self, shard_of: np.ndarray, window_of: np.ndarray) -> np.ndarray:
        tokens = np.empty((len(shard_of), self.sequence_tokens + 1), np.uint16)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            ids = self._cache.open(self._rows[shard])
            views = np.lib.stride_tricks.sliding_window_view(ids, self.sequence_tokens + 1)
            tokens[here] = views[window_of[here] * self.sequence_tokens]
        return tokens


def inputs_and_targets(windows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens that follow them, int64, B x T each: two views of one copy."""
    tokens = torch.from_numpy(windows.astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]
