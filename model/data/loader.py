"""The batches of a rank: its slices of the global window order, as tensors, prefetched."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from storage.loading.windows import MixedWindows, Windows


class DataLoader:
    """One rank's endless stream of micro-batches from a step on. A background thread prefetches `ahead` of them.

    A rank takes the same slice of every step's batch. A resume reads unused prefetched micro-batches again.
    """

    def __init__(
        self, windows: Windows | MixedWindows, device: torch.device, *, step: int, batch_windows: int, size: int,
        rank: int, ranks: int, ahead: int,
    ) -> None:  # fmt: skip
        self._windows, self._device = windows, device
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
            windows = self._windows.read(step * self._batch_windows + first, self._share)
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
