"""Where training starts: at the run's newest checkpoint, at a checkpoint of another run, or from scratch."""

from dataclasses import asdict

from torch.optim import Optimizer

from model.checkpoints.records import CheckpointRecord, Cursor, checkpoints
from model.checkpoints.weights import load_optimizer, load_weights
from model.config import differences
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.runs.job import Job
from storage.errors import CheckpointInvalid, ObjectMissing
from storage.stores.store import Store


def resume(store: Store, job: Job, ddp: DDPConfig, model: GPT, optimizer: Optimizer) -> tuple[int, list[str]]:
    """Load the checkpoint to start from. Returns its step, and the keys of the metrics that this run has so far.

    Raises CheckpointInvalid if it is damaged or another run's, ObjectMissing if deleted, ValueError if ranks differ.
    """
    newest = next(reversed(checkpoints(store, job.run)), None)
    if not ddp.agree(int(newest.attempt, 16) if newest else 0):
        listed = f"step {newest.step:,}" if newest else "none"
        problem = f"the ranks found different checkpoints (rank {ddp.rank}: {listed}): another process is still saving"
        raise ValueError(f"run {job.run!r}: {problem}. When it has ended, run the same command again.")
    if newest is None:
        return (_start(store, job, model, optimizer) if "start" in job.recipe else 0), []
    _check(job, newest)
    load_weights(store, job.run, newest, model)
    load_optimizer(store, job.run, newest, model, optimizer)
    return newest.step, newest.metrics


def cursor_of(job: Job, next_window: int) -> Cursor:
    """The cursor of the job at this window."""
    recipe, train, mix = job.recipe, job.recipe["train"], job.recipe.get("mix", {})
    return Cursor(recipe["dataset"], recipe["manifest"], train["seed"], train["sequence_tokens"], next_window, mix)


def _start(store: Store, job: Job, model: GPT, optimizer: Optimizer) -> int:
    """Load the checkpoint of another run to start from. Returns the step to start at."""
    start, train = job.recipe["start"], job.recipe["train"]
    record = next((saved for saved in checkpoints(store, start["run"]) if saved.attempt == start["attempt"]), None)
    if record is None:
        problem = f"its start, the checkpoint of step {start['step']:,} of run {start['run']!r}, was deleted"
        remedy = f"To start from the newest checkpoint of {start['run']!r}, choose another name."
        raise ObjectMissing(f"run {job.run!r}: {problem}. {remedy}")
    load_weights(store, start["run"], record, model)
    if train["start_with"] == "weights":
        return 0
    load_optimizer(store, start["run"], record, model, optimizer)
    return record.step


def _check(job: Job, record: CheckpointRecord) -> None:
    """Raise CheckpointInvalid unless the record has the job's model, settings and order of data."""
    cursor = record.cursor or cursor_of(job, 0)
    expected = {"model": job.recipe["model"], "train": job.recipe["train"]} | asdict(cursor_of(job, cursor.next_window))
    saved = {"model": record.model, "train": expected["train"] | record.train} | asdict(cursor)
    if differing := differences(expected, saved):
        problem = f"the checkpoint of step {record.step:,} does not belong to this run: {'; '.join(differing)}"
        remedy = f"Choose another name, delete its checkpoints, or extend it: gpt2 train NEW --extend {job.run} --set …"
        raise CheckpointInvalid(f"run {job.run!r}: {problem}. {remedy}")
