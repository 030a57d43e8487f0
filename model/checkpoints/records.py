"""What a run has left in the store: checkpoints, their records, and metrics. Loads no weights, imports no torch.

A checkpoint counts from the moment its record is there; files that no record names are those of killed attempts.
"""

import json
import re
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from storage.digests import canonical_json, sha256
from storage.errors import AlreadyExists, CheckpointInvalid
from storage.keys import RunKeys
from storage.stores.store import Body, Store, overwrite, read_json

STEP_RECORD = re.compile(r"\d{6,}\.json")
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class CheckpointRecord:
    """The record that makes a checkpoint count: its files, what it belongs to, and the metrics up to it."""

    step: int
    attempt: str
    files: dict[str, dict[str, Any]]  # name: {size_bytes, sha256}
    job: str
    model: dict[str, Any]
    train: dict[str, Any]
    cursor: dict[str, Any]  # {dataset, manifest, seed, sequence_tokens, next_window}
    metrics: list[str]  # keys of all segments from the first step on, in order


def checkpoints(store: Store, run: str) -> list[CheckpointRecord]:
    """The complete checkpoints of a run, oldest first: record there, and every file of the size it states."""
    prefix = RunKeys(run).checkpoints
    sizes = {listed.key: listed.size for listed in store.list(prefix)}
    found = []
    for key in sizes:
        if STEP_RECORD.fullmatch(key.removeprefix(prefix)) and (value := read_json(store, key)) is not None:
            record = CheckpointRecord(**value)  # type: ignore[arg-type]  # JSON of our own
            files = {
                RunKeys(run).checkpoint_file(record.step, record.attempt, name): found
                for name, found in record.files.items()
            }
            if all(sizes.get(file) == stated["size_bytes"] for file, stated in files.items()):
                found.append(record)
    return sorted(found, key=lambda record: record.step)


def put_checkpoint(
    store: Store, run: str, files: dict[str, Body], about: dict[str, Any], attempt: str = ""
) -> CheckpointRecord:
    """Put the files, then the record, then point `latest` at it; killed anywhere, the previous one stays the newest.

    `about` is all of the record but its attempt and its files. Asked again with the `attempt` of one that failed, it
    goes on where that one stood. Raises CheckpointInvalid when another process has written this step of the run.
    """
    attempt = attempt or secrets.token_hex(6)
    for name, body in files.items():
        with suppress(AlreadyExists):  # nobody else has this attempt: an earlier try has put it
            store.put_new(RunKeys(run).checkpoint_file(about["step"], attempt, name), body)
    stated = {name: {"size_bytes": len(body), "sha256": sha256(body)} for name, body in files.items()}
    record = _put_record(store, run, CheckpointRecord(attempt=attempt, files=stated, **about))
    pointer = {"step": record.step, "record": RunKeys(run).checkpoint_record(record.step), "commit_id": attempt}
    overwrite(store, RunKeys(run).latest, canonical_json(pointer))
    return record


def _put_record(store: Store, run: str, record: CheckpointRecord) -> CheckpointRecord:
    """The record that is in the store then: this one, or that of an earlier try which was not told so."""
    key, body = RunKeys(run).checkpoint_record(record.step), canonical_json(asdict(record))
    try:
        store.put_new(key, body)
    except AlreadyExists as error:
        there = next((found for found in checkpoints(store, run) if found.step == record.step), None)
        if there is not None and there.attempt == record.attempt:
            return there
        if there is not None:
            raise CheckpointInvalid(
                f"run {run!r}: step {record.step:,} was saved by another process meanwhile. "
                f"Train a run in one place at a time; running again goes on from the newest checkpoint."
            ) from error
        store.delete(key)  # it names files that are gone or cut, so it never counted
        store.put_new(key, body)
    return record


def retained(records: list[CheckpointRecord], keep_last: int, keep_every_steps: int) -> list[CheckpointRecord]:
    """The checkpoints to keep: the newest `keep_last`, and the first at or after each multiple of `keep_every_steps`.

    After: one whose turn it was may have had to wait for the one before. 0: none more.
    """
    kept, passed = [], 0
    for index, record in enumerate(records):
        multiples = record.step // keep_every_steps if keep_every_steps else 0
        if multiples > passed or index >= len(records) - keep_last:
            kept.append(record)
        passed = multiples
    return kept


def retain(store: Store, run: str, keep_last: int, keep_every_steps: int) -> None:
    """Delete the checkpoints that are not to be kept, as `retained` says."""
    there = checkpoints(store, run)
    kept = retained(there, keep_last, keep_every_steps)
    for record in [record for record in there if record not in kept]:
        store.delete(RunKeys(run).checkpoint_record(record.step))  # first: without it the rest does not count
        for name in record.files:
            store.delete(RunKeys(run).checkpoint_file(record.step, record.attempt, name))


def read_metrics(store: Store, run: str) -> list[dict[str, Any]]:
    """One entry a step up to the newest checkpoint, in order."""
    kept = checkpoints(store, run)
    return read_segments(store, kept[-1].metrics) if kept else []


def read_segments(store: Store, segments: list[str]) -> list[dict[str, Any]]:
    """The entries of these segments of metrics, in order."""
    return [json.loads(line) for key in segments for line in store.read(key).body.splitlines()]
