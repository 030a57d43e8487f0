"""A job: the request to a process and its result, in the store. Its recipe's digest names it. Imports no torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic_core import to_jsonable_python

from model.config import How
from storage.digests import canonical_json, digest
from storage.errors import ObjectMissing
from storage.keys import RunKeys, failure
from storage.loading.mix import Share
from storage.stores.store import Store, overwrite, put_once, read_as

USER_ERROR = 2  # exit code of a process that failed because of something a user can fix
OUT_OF_MEMORY = "memory ran out. Use fewer workers: --set resources.workers=1. Finished shards stay."


class JobFailed(Exception):
    """A process failed, was stopped or was not started, so its job has no result. The message says what to do."""


class JobRefused(ValueError):
    """A process ended with an error that the user can fix. The message is the process's own."""


@dataclass(frozen=True)
class Job:
    """One unit of work: its run and kind, the recipe that decides the result, and how to run it this time."""

    run: str
    kind: str
    recipe: dict[str, Any]
    how: How = field(default=How(), compare=False)

    @property
    def job_id(self) -> str:
        return f"{self.kind}-{digest(self.recipe)[:8]}"

    @property
    def key(self) -> str:
        return RunKeys(self.run).job(self.job_id)

    @property
    def mix(self) -> dict[str, Share]:
        """The datasets that the job reads: its own alone, unless the recipe has a mix."""
        own = {self.recipe["dataset"]: {"manifest": self.recipe["manifest"], "weight": 1}}
        return {dataset: Share(**share) for dataset, share in self.recipe.get("mix", own).items()}


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training job: steps done, tokens seen, hardware and versions."""

    step: int
    tokens: int
    environment: dict[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSummary:
    """The result of an evaluation job: its metrics, and the key of the whole evaluation."""

    name: str
    step: int
    metrics: dict[str, float]
    key: str


def put_job(store: Store, job: Job) -> str:
    """Put the job into the store for its processes to read. Replaces an earlier `how`. Returns the key."""
    overwrite(store, job.key, canonical_json(to_jsonable_python(job)))
    return job.key


def read_job(store: Store, key: str) -> Job:
    """The job at a key. Raises ObjectMissing, or ObjectCorrupt if the job is not the one that the key names."""
    job = read_as(store, key, Job, lambda job: job.key == key)
    if job is None:
        raise ObjectMissing(f"store {store.url!r} has no job {key!r}. Start it with gpt2 train or gpt2 evaluate.")
    return job


def put_result(store: Store, job: Job, result: dict[str, Any]) -> None:
    """Put the result, which marks the job as done, and delete the note of an earlier failure."""
    result_key = RunKeys(job.run).result(job.job_id)
    put_once(store, result_key, canonical_json(result))  # another process with this recipe has the same result
    store.delete(failure(result_key))


def read_result(store: Store, job: Job) -> dict[str, Any] | None:
    """The result of the job, or None if it is not done. Raises ObjectCorrupt if it is damaged."""
    kind: type[TrainingResult | EvaluationSummary] = TrainingResult if job.kind == "train" else EvaluationSummary
    result = read_as(store, RunKeys(job.run).result(job.job_id), kind)
    return None if result is None else asdict(result)


def note_failure(store: Store, record_key: str, reason: str) -> None:
    """Store why a job failed, beside the key of its record. `put_result` deletes the note."""
    overwrite(store, failure(record_key), canonical_json({"why": reason}))
