"""Saves checkpoints in the background while training continues: one at a time, with retries.

    main thread:        snapshot ─▶ next step ─▶ …            waits for the copy, at most a step for the previous save
    saving thread:      metrics ─▶ files ─▶ record ─▶ retention      ─┐
                        └─────── the store fails: wait, retry ◀───────┘

A checkpoint that cannot be stored is dropped when the next one is due.
"""

import secrets
import threading
import time
from dataclasses import replace

from torch.optim import Optimizer

from model.checkpoints.records import CheckpointRecord, StepMetrics, put_checkpoint, retain
from model.checkpoints.weights import snapshot
from model.config import TrainingConfig
from model.gpt import GPT
from model.training.metrics import MetricsLog
from storage.errors import CheckpointInvalid, StorageError, StoreUnavailable
from storage.stores.store import Store

RETRY_SECONDS = 10.0  # between two tries; each try repeats its requests for a minute


class Saver:
    """Stores the checkpoints of one run. `save`, `finish` and `check` raise what `_try` raised in the background."""

    def __init__(self, store: Store, run: str, log: MetricsLog, config: TrainingConfig, unsaved_minutes: float) -> None:
        self._store, self._run, self._log, self._config = store, run, log, config
        self._unsaved_minutes = unsaved_minutes
        self._files: dict[str, bytearray] = {}  # of the newest snapshot
        self._thread = threading.Thread()
        self._thread.start()  # nothing, so that it can be joined
        self._give_way = threading.Event()
        self._failing_since: float | None = None
        self._error: Exception | None = None

    def save(self, model: GPT, optimizer: Optimizer, record: CheckpointRecord, *, wait_seconds: float) -> bool:
        """Store a snapshot in the background. Returns False if the previous save still runs after `wait_seconds`."""
        deadline = time.monotonic() + wait_seconds
        while self._thread.is_alive() and (seconds_left := deadline - time.monotonic()) > 0:
            if self._failing_since is not None:
                self._give_way.set()  # to this checkpoint
            self._thread.join(min(seconds_left, 1.0))
        self.check()
        if self._thread.is_alive():
            return False
        snapshot(model, optimizer, self._files)
        record = replace(record, attempt=secrets.token_hex(6))  # the same for all tries: no file is stored twice
        self._give_way.clear()
        self._thread = threading.Thread(target=self._save, args=(record, self._log.unsaved()), daemon=True)
        self._thread.start()
        return True

    def finish(self) -> None:
        """Wait until the last checkpoint is stored."""
        self._thread.join()
        self.check()

    def close(self) -> None:
        """Wait for the save in progress, unless the store fails."""
        self._give_way.set()
        self._thread.join()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _save(self, record: CheckpointRecord, metrics: list[StepMetrics]) -> None:
        try:
            while not self._try(record, metrics):
                if self._give_way.wait(RETRY_SECONDS):
                    return
            try:
                retain(self._store, self._run, self._config)
            except StorageError as error:  # the next save tries again
                print(f"old checkpoints of run {self._run!r} could not be deleted: {error}", flush=True)
        except Exception as error:  # a bug of ours, too: training must not go on without checkpoints
            self._error = error

    def _try(self, record: CheckpointRecord, metrics: list[StepMetrics]) -> bool:
        """Try once. Raises StoreUnavailable after `unsaved_minutes`, CheckpointInvalid if another process trains it."""
        try:
            segments = self._log.put_segment(metrics)
            stored = put_checkpoint(self._store, self._run, self._files, replace(record, metrics=segments))
        except CheckpointInvalid:
            raise
        except StorageError as error:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            minutes = (now - self._failing_since) / 60
            if minutes > self._unsaved_minutes:
                limit = f"resources.unsaved_minutes = {self._unsaved_minutes:g}"
                problem = f"run {self._run!r}: no checkpoint could be stored for {minutes:.0f} minutes ({limit})"
                remedy = "The next start resumes from the newest stored checkpoint. The last error"
                raise StoreUnavailable(f"{problem}. {remedy}, at step {record.step:,}: {error}") from error
            waiting = f"training goes on for at most {self._unsaved_minutes - minutes:.0f} minutes"
            print(f"checkpoint of step {record.step:,} is not stored yet, {waiting}: {error}", flush=True)
            return False
        self._failing_since = None
        self._log.saved(len(metrics), stored.metrics)
        return True
