"""Opens shards for reading: mapped, verified when first opened, and cached on this host if the store is remote."""

import logging
import threading
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from storage.cache import host
from storage.datasets.manifest import ShardRow
from storage.datasets.records import DTYPE
from storage.datasets.shards import read_shard
from storage.digests import sha256
from storage.errors import ShardCorrupt, StorageError
from storage.keys import DatasetKeys
from storage.stores.store import Store

OPEN_SHARDS = 32  # mapped at once, each a file descriptor: training reads 8 at a time, validation one by one
LIMIT_BYTES = 50_000_000_000  # of the host's cache, the default of `resources.cache_bytes`
log = logging.getLogger(__name__)


class ShardCache:
    """The shards of one dataset as read-only arrays of token ids."""

    def __init__(self, store: Store, dataset: str, limit_bytes: int = LIMIT_BYTES) -> None:
        self._store, self._dataset = store, dataset
        self._read = partial(read_shard, store, dataset)
        self._host = host.HostCache(host.FOLDER, limit_bytes)
        self.open = lru_cache(maxsize=OPEN_SHARDS)(self._open_verified)
        self._verified: set[str] = set()
        self._prefetching = threading.Thread()

    def prefetch(self, rows: list[ShardRow]) -> bool:
        """Download shards in the background, one by one. Does nothing and returns False while a prefetch runs."""
        if self._prefetching.is_alive():
            return False
        if not rows or self._local_path(rows[0]):
            return True
        missing = [row for row in rows if not self._host.has(row.sha256)]
        self._prefetching = threading.Thread(target=self._fetch_all, args=(missing,), daemon=True)
        self._prefetching.start()
        return True

    def _open_verified(self, row: ShardRow) -> np.ndarray:
        """The shard's token ids, uint16, mapped. Raises ObjectMissing, or ShardCorrupt for wrong bytes."""
        if (tokens := self._mapped(row)) is None and not self._local_path(row):
            log.warning("cache: the copy of shard %s on this host is damaged; downloading it again", row.shard_id)
            self._host.quarantine(row.sha256)
            tokens = self._mapped(row)
        if tokens is None:
            self._read(row)  # raises if the store's copy is also damaged
            problem = "intact in the store, but this host's disk returns other bytes"
            remedy = "Check that disk, or set HOME to a folder on another disk."
            raise ShardCorrupt(f"shard {row.shard_id!r} of dataset {self._dataset!r}: {problem}. {remedy}")
        return tokens

    def _mapped(self, row: ShardRow) -> np.ndarray | None:
        """The shard's file as an array, or None if it is missing or damaged."""
        path = self._local_path(row)
        try:
            with path.open("rb") if path else self._host.open(row.sha256, partial(self._read, row)) as file:
                tokens: np.ndarray = np.memmap(file, DTYPE, mode="r")  # holds the file open, so it is not evicted
        except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError):  # ValueError: empty, odd size
            return None
        if row.sha256 not in self._verified and sha256(tokens.data) != row.sha256:
            return None
        self._verified.add(row.sha256)
        return tokens

    def _local_path(self, row: ShardRow) -> Path | None:
        return self._store.local_path(DatasetKeys(self._dataset).shard(row.shard_id))

    def _fetch_all(self, rows: list[ShardRow]) -> None:
        with suppress(StorageError):  # `open` tries again and raises the error
            for row in rows:
                self._host.open(row.sha256, partial(self._read, row)).close()
