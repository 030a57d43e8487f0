"""Opens shards for reading: verified at the first open in a process, mapped afterwards. Decides no order.

A store that keeps its objects as files on this host is mapped in place; nothing is copied.
"""

import numpy as np

from storage import keys
from storage.canonical import sha256
from storage.errors import ObjectMissing, ShardCorrupt
from storage.manifest import ShardRow
from storage.shards import DTYPE
from storage.store import Store


class ShardCache:
    """The shards of one dataset as read-only arrays of token ids."""

    def __init__(self, store: Store, dataset: str) -> None:
        self._store = store
        self._dataset = dataset
        self._opened: dict[str, np.ndarray] = {}

    def open(self, row: ShardRow) -> np.ndarray:
        """The shard's token ids, uint16, mapped. Raises ShardCorrupt when its bytes are not the manifest's."""
        if row.shard_id not in self._opened:
            self._opened[row.shard_id] = self._verified(row)
        return self._opened[row.shard_id]

    def _verified(self, row: ShardRow) -> np.ndarray:
        path = self._store.local_path(keys.shard(self._dataset, row.shard_id))
        assert path is not None, "only folder stores are opened by this version"
        try:
            tokens: np.ndarray = np.memmap(path, DTYPE, mode="r")
            found = sha256(tokens.data)
        except FileNotFoundError as error:
            raise ObjectMissing(
                f"shard {row.shard_id!r} of dataset {self._dataset!r} is not in the store. "
                f"Rebuild it: gpt2 dataset verify --repair"
            ) from error
        except ValueError:  # a file that is empty or of odd size cannot be mapped
            tokens, found = np.empty(0, DTYPE), sha256(path.read_bytes())
        if found != row.sha256:
            raise ShardCorrupt(
                f"shard {row.shard_id!r} of dataset {self._dataset!r}: the manifest says sha256 {row.sha256}, found "
                f"{found} ({len(tokens):,} of {row.tokens:,} tokens). Rebuild it: gpt2 dataset verify --repair"
            )
        return tokens
