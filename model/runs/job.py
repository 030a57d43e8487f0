"""A job: what one process is asked, and what it answered, as objects in the store. Imports no torch.

A job is named by the digest of its recipe, so "is it done?" is one look at its result. The result is written last.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from storage import keys
from storage.digests import canonical_json, digest
from storage.errors import AlreadyExists
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite, read_json

USER_ERROR = 2  # exit code of a process that failed because of something a user can fix


class JobFailed(Exception):
    """A process ended without a result; the message holds its last lines."""


class JobRefused(ValueError):
    """A process found something that a user can mend; the message is its own."""


@dataclass(frozen=True)
class Job:
    """A kind of work, the recipe that decides its answer, the run it belongs to, and how it was asked to run."""

    run: str
    kind: str
    recipe: dict[str, Any]
    how: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def job_id(self) -> str:
        """Readable, and one for each recipe."""
        return f"{self.kind}-{digest(self.recipe)[:8]}"

    @property
    def key(self) -> str:
        """Where the job is asked."""
        return RunKeys(self.run).job(self.job_id)


def put_job(store: Store, job: Job) -> str:
    """Put the job where its processes find it, as it is to run this time. Returns its key."""
    overwrite(store, job.key, canonical_json(asdict(job)))
    return job.key


def read_job(store: Store, key: str) -> Job:
    """The job at a key. Raises ObjectMissing."""
    return Job(**json.loads(store.read(key).body))


def put_result(store: Store, job: Job, result: dict[str, Any]) -> None:
    """Put the job's result: from now on it is done."""
    with suppress(AlreadyExists):  # another process of the same job was faster; same recipe, same answer
        store.put_new(RunKeys(job.run).result(job.job_id), canonical_json(result))
    store.delete(keys.failure(RunKeys(job.run).result(job.job_id)))


def read_result(store: Store, job: Job) -> dict[str, Any] | None:
    """What the job's process answered, or None when it is not done."""
    return read_json(store, RunKeys(job.run).result(job.job_id))


def note_failure(store: Store, record_key: str, why: str) -> None:
    """Keep why a job failed last, beside where its record would be; a later success removes it."""
    overwrite(store, keys.failure(record_key), canonical_json({"why": why}))
