"""From a manifest to batches: windows of the global order, of which each rank takes its slice. Tokenises nothing."""

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

# Made, handed from thread to thread, moved and cut at once: 4 MB as int64, a step of the default recipe. One by one,
# micro-batches of 8 x 1,024 tokens cost 30 us each for that, as long as reading them takes.
BLOCK_TOKENS = 524_288


class DataLoader:
    """The windows of one split, as this host's cache gives them."""

    def __init__(
        self, store: Store, dataset: str, manifest: Manifest, split: str, *, sequence_tokens: int, seed: int,
        cache_bytes: int = LIMIT_BYTES,
    ) -> None:  # fmt: skip
        self._rows: list[ShardRow] = list(manifest.rows(split))
        self._cache = ShardCache(store, dataset, cache_bytes)
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

    def shards_of(self, first: int, count: int) -> list[str]:
        """The shards that windows `first` to `first + count` of the stream lie in."""
        shard_of, _ = self.order.locate(first, count)
        return [self._rows[shard].shard_id for shard in np.unique(shard_of)]

    def _gather(self, shard_of: np.ndarray, window_of: np.ndarray) -> np.ndarray:
        tokens = np.empty((len(shard_of), self.sequence_tokens + 1), np.uint16)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            ids = self._cache.open(self._rows[shard])
            views = np.lib.stride_tricks.sliding_window_view(ids, self.sequence_tokens + 1)
            tokens[here] = views[window_of[here] * self.sequence_tokens]
        return tokens


class MicroBatches:
    """The endless micro-batches of one rank from a step on, made ready ahead by a thread, on their way to the device.

    They are the rank's slices of the steps' batches, so what was made ready but not used is made again after a resume.
    A thread has at least `ahead` of them ready, in blocks of up to BLOCK_TOKENS.
    """

    def __init__(
        self, loader: DataLoader, device: torch.device, *, step: int, batch_windows: int, size: int, rank: int,
        ranks: int, ahead: int,
    ) -> None:  # fmt: skip
        self._loader, self._device = loader, device
        self._batch_windows, self._size = batch_windows, size
        self._share = batch_windows // ranks
        batches = max(BLOCK_TOKENS // (size * loader.sequence_tokens), 1)  # of a block
        self._made = self._make(step, rank * self._share, batches * size)
        self._cut: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._ready: queue.Queue[Tensor | BaseException] = queue.Queue(max(-(-ahead // batches), 1))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._make_ahead, daemon=True) if ahead else None
        if self._thread:
            self._thread.start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, int64, B x T each. Raises what opening a shard raises."""
        found = next(self._cut, None)
        if found is None:
            tokens, targets = inputs_and_targets(self._block(), self._device)
            self._cut = zip(torch.split(tokens, self._size), torch.split(targets, self._size), strict=True)
            found = next(self._cut)
        return found

    def close(self) -> None:
        """Make no more."""
        self._ended.set()
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()  # the thread may wait for room

    def _block(self) -> Tensor:
        ready = self._ready.get() if self._thread else next(self._made)
        if isinstance(ready, BaseException):
            raise ready
        return ready

    def _make(self, step: int, first: int, block: int) -> Iterator[Tensor]:
        while True:
            windows = self._loader.windows(step * self._batch_windows + first, self._share)
            for start in range(0, self._share, block):
                yield widened(windows[start : start + block], self._device)
            step += 1

    def _make_ahead(self) -> None:
        try:
            for tokens in self._made:
                self._ready.put(tokens)
                if self._ended.is_set():
                    return
        except BaseException as error:  # the training's thread raises it
            self._ready.put(error)


def widened(windows: np.ndarray, device: torch.device) -> Tensor:
    """The windows as int64, which an embedding wants, in memory that the device, if a GPU, can fetch by itself."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    return tokens.pin_memory() if device.type == "cuda" else tokens


def inputs_and_targets(tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens that follow them, B x T each: two views of one copy on the device."""
    moved = tokens.to(device, non_blocking=True)
    return moved[:, :-1], moved[:, 1:]
