"""Where a training begins: at its run's newest checkpoint, at another run's that it starts from, or at nothing.

Refuses a checkpoint of another model, schedule or dataset, and says what differs. Trains nothing, saves nothing.
"""

from typing import Any

import torch

from model.checkpoints.records import CheckpointRecord, checkpoints
from model.checkpoints.weights import load_optimizer, load_weights
from model.config import differences
from model.gpt import GPT
from model.runs.job import Job
from storage.errors import CheckpointInvalid, ObjectMissing
from storage.stores.store import Store


def resume(store: Store, job: Job, model: GPT, optimizer: torch.optim.Optimizer) -> tuple[int, CheckpointRecord | None]:
    """Load what the training goes on from. Returns its step, and the record when it is the run's own.

    Raises CheckpointInvalid when that checkpoint is damaged or of something else, ObjectMissing when it is gone.
    """
    if kept := checkpoints(store, job.run):
        record = kept[-1]
        _check(job, record)
        load_weights(store, job.run, record, model)
        load_optimizer(store, job.run, record, model, optimizer)
        return record.step, record
    start = job.recipe.get("start")
    if start is None:
        return 0, None
    found = [one for one in checkpoints(store, start["run"]) if one.attempt == start["attempt"]]
    if not found:
        raise ObjectMissing(
            f"run {job.run!r} starts from step {start['step']:,} of run {start['run']!r}, which is no longer there. "
            f"Start another run from its newest checkpoint: --set name=…"
        )
    load_weights(store, start["run"], found[0], model)
    if job.recipe["train"]["start_with"] == "weights":
        return 0, None
    if found[0].step >= job.recipe["train"]["max_steps"]:
        raise ValueError(
            f"train.max_steps = {job.recipe['train']['max_steps']:,}: run {job.run!r} starts with everything of step "
            f"{found[0].step:,} of run {start['run']!r}, so no step is left. Choose another name and more steps."
        )
    load_optimizer(store, start["run"], found[0], model, optimizer)
    return found[0].step, None


def cursor_of(job: Job) -> dict[str, Any]:
    """What decides the order of the data: of it, the next window is all that moves."""
    train = job.recipe["train"]
    data = {name: job.recipe[name] for name in ("dataset", "manifest")}
    return data | {name: train[name] for name in ("seed", "sequence_tokens")}


def _check(job: Job, record: CheckpointRecord) -> None:
    asked = {"model": job.recipe["model"], "train": job.recipe["train"]} | cursor_of(job)
    found = asked | record.cursor | {"model": record.model, "train": asked["train"] | record.train}
    if differing := differences(asked, found):
        raise CheckpointInvalid(
            f"run {job.run!r}: the checkpoint of step {record.step:,} belongs to something else: "
            f"{'; '.join(differing)}. Choose another name with --set name=…, or delete the run's checkpoints. To go "
            f"on from it with other settings: --set name=… --set train.start_from={job.run} "
            f"--set train.start_with=everything"
        )
