"""Records the shard jobs that a build submits, and makes a shard job fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flows.tokenise import tokenise_shards
from storage.datasets.recipe import ShardRecipe
from storage.datasets.records import Record
from storage.digests import canonical_json
from storage.keys import DatasetKeys
from storage.stores.store import Store


class Jobs:
    """The shards of the submitted jobs."""

    def __init__(self) -> None:
        self.shard_ids: list[str] = []


@contextmanager
def counting_jobs() -> Iterator[Jobs]:
    """Record the jobs that flows in this process submit while the block runs."""
    jobs, submit = Jobs(), tokenise_shards.submit

    def submit_and_note(name: str, submitted: list[Any], *rest: Any) -> Any:
        jobs.shard_ids += [job.shard_id for job in submitted]
        return submit(name, submitted, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise_shards, "submit", submit_and_note)
        yield jobs


def put_wrong_record(store: Store, dataset: str, shard_id: str) -> None:
    """Store a record with a wrong checksum, so that the shard's job fails until the record is deleted."""
    record = Record(shard_id, 3, 1, 0, 1, "0" * 64, "x", ShardRecipe("x", 0, 1, "x"), {})
    store.put_new(DatasetKeys(dataset).record(shard_id), canonical_json(record.to_json()))
