"""Who may change which shards of a dataset count: builds, or for an hour at most the one who collects garbage.

A build counts shards that an earlier one left, a collector deletes them. Both first swap one small object, so neither
can begin unseen by the other. Times are the store's own. Knows no shard.
"""

import json
import secrets
from typing import Literal

from storage.digests import canonical_json
from storage.errors import Conflict, ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import Store, clock

COLLECTING_SECONDS = 3600.0  # after which a build takes the lease over: a collector that was killed blocks no longer
Holder = Literal["build", "collector"]


def claim(store: Store, dataset: str, holder: Holder, idle_since: float = 0.0) -> str:
    """Become the one who changes the dataset; builds may be many. Returns the lease's etag.

    Raises Conflict while a collector is at work, and for a collector when a build began after `idle_since`.
    """
    key = DatasetKeys(dataset).lease
    while True:
        try:
            found = store.read(key)
        except ObjectMissing:
            etag = None
        else:
            etag = found.etag
            if holder == "collector" and last_build(store, dataset) >= idle_since:
                raise Conflict(f"dataset {dataset!r}: a build has just begun. Run gpt2 gc again when it has ended.")
            if json.loads(found.body)["holder"] == "collector" and _age_seconds(store, key) < COLLECTING_SECONDS:
                raise Conflict(
                    f"dataset {dataset!r}: gpt2 gc is deleting there right now. Run the same command again when it is "
                    f"done; one that was killed is in the way for {COLLECTING_SECONDS / 60:.0f} minutes at most."
                )
        try:
            return store.swap(key, canonical_json({"holder": holder, "commit_id": secrets.token_hex(8)}), etag)
        except Conflict:
            if holder == "collector":
                raise
            continue  # another build came in between


def holds(store: Store, dataset: str, etag: str) -> bool:
    """Whether the lease of that etag still stands: nobody has taken it over."""
    try:
        return store.read(DatasetKeys(dataset).lease).etag == etag
    except ObjectMissing:
        return False


def release(store: Store, dataset: str, etag: str) -> None:
    """End a collector's lease, unless somebody has taken it over."""
    if holds(store, dataset, etag):
        store.delete(DatasetKeys(dataset).lease)


def last_build(store: Store, dataset: str) -> float:
    """When a build of the dataset began last (Unix seconds of the store), 0 when none is known."""
    try:
        return store.stat(DatasetKeys(dataset).lease).modified
    except ObjectMissing:
        return 0.0


def _age_seconds(store: Store, key: str) -> float:
    try:
        return clock(store) - store.stat(key).modified
    except ObjectMissing:
        return COLLECTING_SECONDS
