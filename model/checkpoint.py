"""A checkpoint: all that a run needs to go on from a step, as a few files and a record written last. Decides nothing.

Weights and optimizer state are safetensors: no pickle is ever loaded. What is drawn at random in step k is a function
of (seed, k, rank), so there is no generator state to keep.
"""

import secrets
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from model.gpt import GPT
from model.history import CheckpointRecord, checkpoints, retained
from storage import keys
from storage.canonical import canonical_json, sha256
from storage.errors import AlreadyExists, CheckpointInvalid
from storage.store import Store, overwrite

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


def save_checkpoint(
    store: Store,
    run: str,
    *,
    step: int,
    job: str,
    cursor: dict[str, Any],
    train: dict[str, Any],
    model: GPT,
    optimizer: torch.optim.Optimizer,
    metrics: list[str],
) -> CheckpointRecord:
    """Put the files, then the record, then point `latest` at it; killed anywhere, the previous one stays the newest.

    Raises CheckpointInvalid when another process has written this step of the run meanwhile.
    """
    attempt = secrets.token_hex(6)
    bodies = {WEIGHTS: save(_weights(model)), OPTIMIZER: save(_optimizer_tensors(model, optimizer))}
    for name, body in bodies.items():
        store.put_new(keys.checkpoint_file(run, step, attempt, name), body)
    record = CheckpointRecord(
        step=step,
        attempt=attempt,
        files={name: {"size_bytes": len(body), "sha256": sha256(body)} for name, body in bodies.items()},
        job=job,
        model=model.config.model_dump(mode="json"),
        train=train,
        cursor=cursor,
        metrics=metrics,
    )
    record_key = keys.checkpoint_record(run, step)
    try:
        store.put_new(record_key, canonical_json(asdict(record)))
    except AlreadyExists as error:
        if any(found.step == step for found in checkpoints(store, run)):
            raise CheckpointInvalid(
                f"run {run!r}: step {step:,} was saved by another process meanwhile. "
                f"Train a run in one place at a time; running again goes on from the newest checkpoint."
            ) from error
        store.delete(record_key)  # it names files that are gone or cut, so it never counted
        store.put_new(record_key, canonical_json(asdict(record)))
    pointer = {"step": step, "record": record_key, "commit_id": attempt}
    overwrite(store, keys.run_latest(run), canonical_json(pointer))
    return record


def load_weights(store: Store, run: str, record: CheckpointRecord, model: GPT) -> None:
    """Put the checkpoint's weights into the model. Raises CheckpointInvalid when they are damaged or do not fit."""
    tensors = _read(store, run, record, WEIGHTS)
    wanted = {name: weight.shape for name, weight in model.named_parameters()}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise CheckpointInvalid(
            f"run {run!r}: the checkpoint of step {record.step:,} holds the weights of another model. "
            f"Choose another name with --set name=…, or delete that checkpoint."
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[name])


def load_optimizer(
    store: Store, run: str, record: CheckpointRecord, model: GPT, optimizer: torch.optim.Optimizer
) -> None:
    """Put the checkpoint's optimizer state back. Raises CheckpointInvalid when it is damaged."""
    tensors = _read(store, run, record, OPTIMIZER)
    for name, weight in model.named_parameters():
        fields = ("step", "exp_avg", "exp_avg_sq")  # all on the weight's device, as fused AdamW wants them
        optimizer.state[weight] = {field: tensors[f"{name}.{field}"].to(weight.device) for field in fields}


def retain(store: Store, run: str, keep_last: int, keep_every_steps: int) -> None:
    """Delete the checkpoints that are neither among the newest `keep_last` nor at a multiple of `keep_every_steps`."""
    there = checkpoints(store, run)
    kept = retained(there, keep_last, keep_every_steps)
    for record in [record for record in there if record not in kept]:
        store.delete(keys.checkpoint_record(run, record.step))  # first: without it the rest does not count
        for name in record.files:
            store.delete(keys.checkpoint_file(run, record.step, record.attempt, name))


def _weights(model: GPT) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": value.detach().cpu().contiguous()
        for name, weight in model.named_parameters()
        for field, value in optimizer.state[weight].items()
    }


def _read(store: Store, run: str, record: CheckpointRecord, name: str) -> dict[str, Tensor]:
    key = keys.checkpoint_file(run, record.step, record.attempt, name)
    stated = record.files[name]
    found = store.read(key, stated["size_bytes"])
    if found.sha256 != stated["sha256"]:
        raise CheckpointInvalid(
            f"run {run!r}: {key!r} should have sha256 {stated['sha256']}, found {found.sha256}. "
            f"Delete {keys.checkpoint_record(run, record.step)!r} and run again: it goes on from the checkpoint before."
        )
    try:
        return load(bytes(found.body))
    except SafetensorError as error:
        raise CheckpointInvalid(f"run {run!r}: {key!r} is no safetensors file: {error}. Delete its record.") from error
