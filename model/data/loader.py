"""Batches of training data: each rank takes its slice of the global window order. Tokenises nothing."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from model.data.order import WindowOrder
from storage.cache.shards import LIMIT_BYTES, ShardCache
from storage.datasets.manifest import Manifest, ShardRow
from storage.stores.store import Store


class DataLoader:
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

    def windows(self, first: int, count: int) -> np.ndarray:
        """`count` windows of the stream from `first` on, uint16, count x (T + 1)."""
        upcoming = self.order.upcoming_shards(first)
        if upcoming != self._prefetched and self._cache.prefetch([self._rows[shard] for shard in upcoming]):
            self._prefetched = upcoming
        return self._gather(*self.order.locate(first, count))

    def windows_in_file_order(self, chosen: np.ndarray) -> np.ndarray:
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


class MicroBatches:
    """One rank's endless stream of micro-batches from a step on. A background thread prefetches `ahead` of them.

    A rank takes the same slice of every step's batch. A resume reads unused prefetched micro-batches again.
    """

    def __init__(
        self, loader: DataLoader, device: torch.device, *, step: int, batch_windows: int, size: int, rank: int,
        ranks: int, ahead: int,
    ) -> None:  # fmt: skip
        self._loader, self._device = loader, device
        self._batch_windows, self._share, self._size = batch_windows, batch_windows // ranks, size
        self._stream = self._read(step, rank * self._share)
        self._ready: queue.Queue[Tensor | BaseException] = queue.Queue(max(ahead, 1))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, daemon=True) if ahead else None
        if self._thread:
            self._thread.start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, int64, B x T each. Raises the errors of opening a shard."""
        tokens = self._ready.get() if self._thread else next(self._stream)
        if isinstance(tokens, BaseException):
            raise tokens
        return inputs_and_targets(tokens, self._device)

    def close(self) -> None:
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()  # the thread may be waiting for space

    def _read(self, step: int, first: int) -> Iterator[Tensor]:
        while True:
            windows = self._loader.windows(step * self._batch_windows + first, self._share)
            for start in range(0, self._share, self._size):
                yield widened(windows[start : start + self._size], self._device)
            step += 1

    def _prefetch(self) -> None:
        try:
            for tokens in self._stream:
                self._ready.put(tokens)
                if self._closed.is_set():
                    return
        except BaseException as error:  # `next` raises it in the training thread
            self._ready.put(error)


def widened(windows: np.ndarray, device: torch.device) -> Tensor:
    """The windows as int64, which cross-entropy requires. For CUDA the memory is pinned, so that copies can overlap."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    return tokens.pin_memory() if device.type == "cuda" else tokens


def inputs_and_targets(tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens that follow them, B x T each: two views of one copy on the device."""
    moved = tokens.to(device, non_blocking=True)
    return moved[:, :-1], moved[:, 1:]
