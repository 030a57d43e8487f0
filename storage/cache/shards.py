"""Opens shards for reading: verified at the first open in a process, mapped afterwards. Decides no order.

A store that keeps its objects as files on this host is mapped in place; of any other the shards come through the
host-wide cache.
"""

import logging
import threading
from collections import OrderedDict

import numpy as np

from storage.cache import host as host_cache
from storage.cache.host import HostCache
from storage.datasets.manifest import ShardRow
from storage.datasets.records import DTYPE
from storage.datasets.shards import read_shard
from storage.digests import sha256
from storage.errors import ShardCorrupt, StorageError
from storage.keys import DatasetKeys
from storage.stores.store import Body, Store

OPEN_SHARDS = 32  # mapped at once, each a file descriptor: training reads 8 at a time, validation one after the other
limit_bytes = 50_000_000_000  # of this host's cache; `resources.cache_bytes` sets it for a process
log = logging.getLogger(__name__)


class ShardCache:
    """The shards of one dataset as read-only arrays of token ids."""

    def __init__(self, store: Store, dataset: str) -> None:
        self._store = store
        self._dataset = dataset
        self._host = HostCache(host_cache.FOLDER, limit_bytes)
        self._opened: OrderedDict[str, np.ndarray] = OrderedDict()
        self._proved: set[str] = set()
        self._coming = threading.Thread()

    def open(self, row: ShardRow) -> np.ndarray:
        """The shard's token ids, uint16, mapped. Raises ShardCorrupt when its bytes are not the manifest's."""
        if row.shard_id not in self._opened:
            self._opened[row.shard_id] = self._verified(row)
            if len(self._opened) > OPEN_SHARDS:
                self._opened.popitem(last=False)
        self._opened.move_to_end(row.shard_id)
        return self._opened[row.shard_id]

    def prefetch(self, rows: list[ShardRow]) -> bool:
        """Bring shards to this host in the background, one after the other. False while earlier ones are coming."""
        if self._coming.is_alive():
            return False
        if not rows or self._local(rows[0]):
            return True
        missing = [row for row in rows if not self._host.has(row.sha256)]
        self._coming = threading.Thread(target=self._fetch_all, args=(missing,), daemon=True)
        self._coming.start()
        return True

    def _verified(self, row: ShardRow) -> np.ndarray:
        tokens = self._mapped(row)
        if tokens is None and not self._local(row):
            log.warning("cache: shard %s was damaged on this host; it is set aside and fetched again", row.shard_id)
            self._host.set_aside(row.sha256)
            tokens = self._mapped(row)
        if tokens is None:
            self._read(row)  # says what is wrong with it
            raise ShardCorrupt(
                f"shard {row.shard_id!r} of dataset {self._dataset!r}: the store has it whole, this host's disk gives "
                f"back other bytes. Check that disk, or let HOME be on another one."
            )
        return tokens

    def _mapped(self, row: ShardRow) -> np.ndarray | None:
        """The shard's file as an array, or None when it does not hold what it should."""
        path = self._store.local_path(DatasetKeys(self._dataset).shard(row.shard_id))
        try:
            with path.open("rb") if path else self._host.open(row.sha256, lambda: self._read(row)) as file:
                tokens: np.ndarray = np.memmap(file, DTYPE, mode="r")  # keeps the file open, so the cache keeps it, too
        except (ValueError, FileNotFoundError):  # empty, of odd size, or not there
            return None
        if row.sha256 not in self._proved:
            if sha256(tokens.data) != row.sha256:
                return None
            self._proved.add(row.sha256)
        return tokens

    def _read(self, row: ShardRow) -> Body:
        return read_shard(self._store, self._dataset, row.shard_id, row.tokens, row.sha256)

    def _local(self, row: ShardRow) -> bool:
        return self._store.local_path(DatasetKeys(self._dataset).shard(row.shard_id)) is not None

    def _fetch_all(self, rows: list[ShardRow]) -> None:
        for row in rows:
            try:
                self._host.open(row.sha256, lambda row=row: self._read(row)).close()  # type: ignore[misc]
            except StorageError as error:
                log.info("cache: %s", error)  # whoever opens the shard will be told
                return
