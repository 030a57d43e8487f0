"""What a run has left in the store: checkpoint records and metrics. Loads no weights, imports no torch."""

import json
import re
from dataclasses import dataclass
from typing import Any

from storage import keys
from storage.store import Store, read_json

STEP_RECORD = re.compile(r"\d{6,}\.json")


@dataclass(frozen=True)
class CheckpointRecord:
    """The record that makes a checkpoint count: its files, what it belongs to, and the metrics up to it."""

    step: int
    attempt: str
    files: dict[str, dict[str, Any]]  # name: {size_bytes, sha256}
    job: str
    model: dict[str, Any]
    train: dict[str, Any]
    cursor: dict[str, Any]  # {dataset, manifest, seed, next_window}
    metrics: list[str]  # keys of all segments from the first step on, in order


def checkpoints(store: Store, run: str) -> list[CheckpointRecord]:
    """The complete checkpoints of a run, oldest first: record there, and every file of the size it states."""
    prefix = keys.checkpoints(run)
    sizes = {listed.key: listed.size for listed in store.list(prefix)}
    found = []
    for key in sizes:
        if STEP_RECORD.fullmatch(key.removeprefix(prefix)) and (value := read_json(store, key)) is not None:
            record = CheckpointRecord(**value)  # type: ignore[arg-type]  # JSON of our own
            files = {
                keys.checkpoint_file(run, record.step, record.attempt, name): found
                for name, found in record.files.items()
            }
            if all(sizes.get(file) == stated["size_bytes"] for file, stated in files.items()):
                found.append(record)
    return sorted(found, key=lambda record: record.step)


def retained(records: list[CheckpointRecord], keep_last: int, keep_every_steps: int) -> list[CheckpointRecord]:
    """The checkpoints to keep: the newest `keep_last` and those at a multiple of `keep_every_steps` (0: none more)."""
    return [
        record
        for index, record in enumerate(records)
        if index >= len(records) - keep_last or (keep_every_steps and record.step % keep_every_steps == 0)
    ]


def read_metrics(store: Store, run: str) -> list[dict[str, Any]]:
    """One entry a step up to the newest checkpoint, in order."""
    kept = checkpoints(store, run)
    lines: list[dict[str, Any]] = []
    for key in kept[-1].metrics if kept else []:
        lines += [json.loads(line) for line in store.read(key).body.splitlines()]
    return lines
