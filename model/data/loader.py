"""The batches of a rank: its slices of the global window order, as tensors, prefetched."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from storage.loading.token_dataset import TokenDataset
from storage.loading.windows import MixedWindows, Windows


class DataLoader:
    """One rank's endless stream of micro-batches from a step on. A background thread prefetches `ahead` of them."""

    def __init__(
        self, windows: Windows | MixedWindows, device: torch.device, *, step: int, batch_windows: int, size: int,
        rank: int, ranks: int, ahead: int,
    ) -> None:  # fmt: skip
        self._windows, self._device, self._ahead = windows, device, ahead
        self._batch_windows, self._share, self._size = batch_windows, batch_windows // ranks, size
        self._stream = self._read(step, rank * self._share)
        self._ready: queue.Queue[Tensor | BaseException] = queue.Queue(max(ahead, 1))
        self._closed = threading.Event()
        if ahead:
            threading.Thread(target=self._prefetch, daemon=True).start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, int64, B x T each. Raises the errors of opening a shard."""
        tokens = self._ready.get() if self._ahead else next(self._stream)
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


class TokenStream(IterableDataset[tuple[Tensor, Tensor]]):
    """A rank's endless batches of `size` windows for other trainers: inputs and targets, int64, B x T each.

    Give it to torch's DataLoader with `batch_size=None`. Worker w of k reads batches w, w + k, and so on.
    """

    def __init__(self, dataset: TokenDataset, size: int, rank: int = 0, ranks: int = 1) -> None:
        self._dataset, self._size, self._rank, self._ranks = dataset, size, rank, ranks
        self._batch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker, cpu = get_worker_info(), torch.device("cpu")
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            first = ((self._batch + number) * self._ranks + self._rank) * self._size
            self._batch += workers
            yield inputs_and_targets(widened(self._dataset.windows.read(first, self._size), cpu), cpu)

    def state_dict(self) -> dict[str, int]:
        """How many batches this process has read. With workers, save how many the loop has taken instead."""
        return {"batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._batch = state["batch"]


def widened(windows: np.ndarray, device: torch.device) -> Tensor:
    """The windows as int64, which cross-entropy requires. For CUDA the memory is pinned, so that copies can overlap."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    return tokens.pin_memory() if device.type == "cuda" else tokens


def inputs_and_targets(tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens that follow them, B x T each: two views of one copy on the device."""
    moved = tokens.to(device, non_blocking=True)
    return moved[:, :-1], moved[:, 1:]
