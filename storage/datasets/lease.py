"""The lease of a dataset, by which builds and garbage collection exclude each other. Times are the store's."""

import secrets
from contextlib import suppress
from typing import Literal, get_args

from storage.digests import canonical_json
from storage.errors import Conflict, ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import Store, clock, read_as

COLLECTING_SECONDS = 3600.0  # then a build may take over: a killed collector must not block it for longer
Holder = Literal["build", "collector"]  # who took the lease last
REMEDY = "Make sure that no gpt2 gc runs, delete the object, and run the command again."


def claim(store: Store, dataset: str, holder: Holder, idle_since: float = 0.0) -> str:
    """Take the lease; any number of builds may share it. Returns its etag.

    Raises Conflict while a collector runs, and for a collector if the lease was taken after `idle_since`.
    """
    key = DatasetKeys(dataset).lease
    while True:
        etag = None
        with suppress(ObjectMissing):
            etag, claimed_at = store.read(key).etag, last_build(store, dataset)
            if holder == "collector" and claimed_at >= idle_since:
                raise Conflict(f"dataset {dataset!r}: a build or gpt2 gc has just started. Run gpt2 gc again later.")
            lease = read_as(store, key, dict[str, str], lambda lease: lease.get("holder") in get_args(Holder), REMEDY)
            if lease and lease["holder"] == "collector" and clock(store) - claimed_at < COLLECTING_SECONDS:
                limit = f"{COLLECTING_SECONDS / 60:.0f} minutes"
                remedy = f"Run the same command again later; a killed gpt2 gc blocks builds for at most {limit}."
                raise Conflict(f"dataset {dataset!r}: gpt2 gc is deleting shards. {remedy}")
        try:
            return store.swap(key, canonical_json({"holder": holder, "commit_id": secrets.token_hex(8)}), etag)
        except Conflict:  # a build shares the lease that another build took first
            if holder == "collector":
                raise


def holds(store: Store, dataset: str, etag: str) -> bool:
    """Whether the lease with that etag is still held."""
    with suppress(ObjectMissing):
        return store.read(DatasetKeys(dataset).lease).etag == etag
    return False


def release(store: Store, dataset: str, etag: str) -> None:
    """End a collector's lease, unless a build has taken it over."""
    if holds(store, dataset, etag):
        store.delete(DatasetKeys(dataset).lease)


def last_build(store: Store, dataset: str) -> float:
    """When a build or a running collector last took the lease, in Unix seconds; 0 if there is no lease."""
    with suppress(ObjectMissing):
        return store.stat(DatasetKeys(dataset).lease).modified
    return 0.0
