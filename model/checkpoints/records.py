"""The checkpoint records and metrics of a run. A checkpoint counts once its record exists. Imports no torch."""

import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, field, replace
from functools import partial
from operator import not_
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass

from model.config import ModelConfig, TrainingConfig
from storage.digests import canonical_json
from storage.errors import CheckpointInvalid, Conflict, ObjectCorrupt, ObjectMissing
from storage.keys import RunKeys, check_key
from storage.loading.mix import Share
from storage.stores.store import Body, Store, put_once, read_as, sha256_of

STEP_RECORD = re.compile(r"\d{6,}\.json")
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class CheckpointFile:
    """Size and digest of one file of a checkpoint."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Cursor:
    """The position of a training run in the global window order: the next window, and what decides the order."""

    dataset: str
    manifest: str
    seed: int
    sequence_tokens: int
    next_window: int
    mix: dict[str, Share] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointRecord:
    """The record that makes a checkpoint count. Metrics, attempt and files are filled in when it is stored."""

    step: int
    job: str
    model: Annotated[dict[str, int], BeforeValidator(lambda model: ModelConfig.model_validate(model).model_dump())]
    train: dict[str, object]
    cursor: Annotated[Cursor | None, BeforeValidator(lambda cursor: cursor or None)] = None  # {} if imported
    metrics: list[Annotated[str, AfterValidator(check_key)]] = field(default_factory=list)  # all segments, in order
    attempt: Annotated[str, Field(pattern="^[0-9a-f]{1,15}$")] = ""
    files: dict[Annotated[str, Field(pattern=r"^[a-z]+\.safetensors$")], CheckpointFile] = field(default_factory=dict)
    val_loss: float | None = None  # of a validation at this very step


class StepMetrics(BaseModel):
    """The numbers of one step. Its JSON has `skipped` only if true, other optional fields only if known."""

    step: int
    loss: float | None  # None: NaN or infinite
    learning_rate: float
    gradient_norm: float | None  # None: NaN or infinite
    skipped: bool = Field(default=False, exclude_if=not_)
    val_loss: float | None = Field(default=None, exclude_if=lambda value: value is None)
    val_losses: dict[str, float] = Field(default={}, exclude_if=not_)  # of a mix, by dataset
    epochs: dict[str, float] = Field(default={}, exclude_if=not_)  # of a mix: passes through each dataset so far
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float | None = Field(default=None, exclude_if=lambda value: value is None)
    data_seconds: float = 0.0  # waiting for batches
    metrics_seconds: float = 0.0  # spent after the previous step, like checkpoint_seconds
    checkpoint_seconds: float = 0.0
    memory_bytes: int = 0


class Progress(BaseModel):
    """The run's live progress: steps done, total steps, and the metrics since the last checkpoint."""

    step: int
    max_steps: int
    since_checkpoint: list[StepMetrics]


def checkpoints(store: Store, run: str) -> list[CheckpointRecord]:
    """Complete checkpoints, oldest first: files have the recorded sizes. Raises ObjectCorrupt for a damaged record."""
    names = RunKeys(run)
    sizes = {listed.key: listed.size for listed in store.list(names.checkpoints)}
    keys = [key for key in sizes if STEP_RECORD.fullmatch(key.removeprefix(names.checkpoints))]
    records = [read_as(store, key, CheckpointRecord, partial(_belongs_to, names, key)) for key in keys]
    complete = []
    for record in filter(None, records):  # None: deleted since it was listed
        files = {names.checkpoint_file(record.step, record.attempt, name): file for name, file in record.files.items()}
        if all(sizes.get(key) == file.size_bytes for key, file in files.items()):
            complete.append(record)
    return sorted(complete, key=lambda record: record.step)


def _belongs_to(names: RunKeys, key: str, record: CheckpointRecord) -> bool:
    return bool(record.attempt) and WEIGHTS in record.files and names.checkpoint_record(record.step) == key


def chosen(store: Store, run: str, checkpoint: str = "last", setting: str = "name") -> list[CheckpointRecord]:
    """The checkpoints that `evaluation.checkpoint` selects, oldest first. Raises ObjectMissing, quoting `setting`."""
    records = checkpoints(store, run)
    if not records:
        problem = f"{setting} = {run!r}: that run has no checkpoint in store {store.url!r}. Train it with gpt2 train"
        raise ObjectMissing(f"{problem}, import a model with gpt2 import, or choose another run from gpt2 status.")
    numbered = [record for record in records if str(record.step) == checkpoint]
    if selected := {"last": records[-1:], "best": best(records), "every": records}.get(checkpoint, numbered):
        return selected
    kept = f"only checkpoints of steps {', '.join(str(record.step) for record in records)}"
    kept += ", none of them saved at a validation" if checkpoint == "best" else ""
    raise ObjectMissing(f"evaluation.checkpoint = {checkpoint!r}: run {run!r} has {kept}. Choose one of these.")


def read_checkpoint_file(store: Store, run: str, record: CheckpointRecord, name: str) -> bytes:
    """One file of a checkpoint. Raises CheckpointInvalid if its digest differs from the recorded digest."""
    key, recorded = RunKeys(run).checkpoint_file(record.step, record.attempt, name), record.files[name]
    stored = store.read(key, recorded.size_bytes)
    if stored.sha256 != recorded.sha256:
        raise CheckpointInvalid(
            f"run {run!r}: {key!r} should have sha256 {recorded.sha256}, found {stored.sha256}. Delete "
            f"{RunKeys(run).checkpoint_record(record.step)!r} and run the command again to use the previous checkpoint."
        )
    return bytes(stored.body)


def put_checkpoint(store: Store, run: str, bodies: Mapping[str, Body], record: CheckpointRecord) -> CheckpointRecord:
    """Put the files, then the record. Returns the stored record.

    If the process is killed, the previous checkpoint stays the newest. A retry with the same `record.attempt` continues
    where the failed try stopped. Raises CheckpointInvalid if another process has saved this step of the run.
    """
    names, attempt = RunKeys(run), record.attempt or secrets.token_hex(6)
    files = {name: CheckpointFile(len(body), sha256_of(body)) for name, body in bodies.items()}
    for name, body in bodies.items():
        put_once(store, names.checkpoint_file(record.step, attempt, name), body)  # attempts are unique
    record = replace(record, attempt=attempt, files=files)
    values = asdict(record)
    cursor = {name: value for name, value in (values["cursor"] or {}).items() if value != {}}
    body = canonical_json({name: value for name, value in values.items() if value is not None} | {"cursor": cursor})
    with suppress(Conflict):
        store.put_new(names.checkpoint_record(record.step), body)
        return record
    stored = next((other for other in checkpoints(store, run) if other.step == record.step), None)
    if stored is None:  # its files are missing or truncated, so that record never counted
        store.delete(names.checkpoint_record(record.step))
        store.put_new(names.checkpoint_record(record.step), body)
    elif stored.attempt != attempt:
        problem = f"run {run!r}: another process already saved step {record.step:,}. Train a run in one place at a time"
        raise CheckpointInvalid(f"{problem}. To continue from the newest checkpoint, run the command again.")
    return stored or record  # stored: by an earlier try whose reply was lost


def best(records: list[CheckpointRecord]) -> list[CheckpointRecord]:
    """The checkpoint with the lowest val loss, the first of equals; none if no record has a val loss."""
    validated = [(record.val_loss, record.step, record) for record in records if record.val_loss is not None]
    return [min(validated)[-1]] if validated else []


def retained(records: list[CheckpointRecord], train: TrainingConfig) -> list[CheckpointRecord]:
    """The checkpoints to keep: the newest, the best, and the first at or after each multiple of `keep_every_steps`."""
    kept, passed = [], 0
    for index, record in enumerate(records):  # one can come after its multiple: a save waits for the previous one
        multiples = record.step // train.keep_every_steps if train.keep_every_steps else 0
        is_best = train.keep_best and record in best(records)
        if multiples > passed or is_best or index >= len(records) - train.keep_last:
            kept.append(record)
        passed = multiples
    return kept


def retain(store: Store, run: str, train: TrainingConfig) -> None:
    """Delete the checkpoints that `retained` does not keep."""
    records = checkpoints(store, run)
    kept = retained(records, train)
    for record in records:
        if record not in kept:
            store.delete(RunKeys(run).checkpoint_record(record.step))  # first, so that the checkpoint stops counting
            for name in record.files:
                store.delete(RunKeys(run).checkpoint_file(record.step, record.attempt, name))


def read_metrics(store: Store, run: str) -> list[StepMetrics]:
    """The metrics of each step up to the newest checkpoint, in order."""
    records = checkpoints(store, run)
    return read_segments(store, records[-1].metrics) if records else []


def read_segments(store: Store, segments: list[str]) -> list[StepMetrics]:
    """The metrics of each step in these segments, in order. Raises ObjectCorrupt for a damaged segment."""
    steps = []
    for key in segments:
        try:
            steps += [StepMetrics.model_validate_json(line) for line in store.read(key).body.splitlines()]
        except ValidationError as error:
            remedy = f"Restore a copy, or continue in a new run: gpt2 train NEW --extend {key.split('/')[1]}"
            raise ObjectCorrupt(f"metrics {key!r} of store {store.url!r} are damaged. {remedy}") from error
    return steps
