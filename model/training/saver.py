"""Saves checkpoints while the training goes on: one at a time, tried again until it is stored or patience ends.

    main thread:        snapshot ─▶ next step ─▶ …            stands still for the copy alone
    saving thread:      metrics ─▶ files ─▶ record ─▶ latest ─▶ retention      ─┐
                        └──────── the store does not take it: wait, again ◀─────┘

A checkpoint that could not be stored yet gives way to a newer one. Knows no step's contents.
"""

import secrets
import threading
import time
from typing import Any

import torch

from model.checkpoints.records import put_checkpoint, retain
from model.checkpoints.weights import Snapshot
from model.gpt import GPT
from model.training.metrics import MetricsLog
from storage.errors import CheckpointInvalid, StorageError, StoreUnavailable
from storage.stores.store import Body, Store

RETRY_SECONDS = 10.0  # after a store has refused a checkpoint, beyond the minute that each request is repeated anyway


class Saver:
    """The checkpoints of one run on their way into the store."""

    def __init__(self, store: Store, run: str, log: MetricsLog, unsaved_seconds: float) -> None:
        self._store, self._run, self._log = store, run, log
        self._unsaved_seconds = unsaved_seconds
        self._snapshot = Snapshot()
        self._thread = threading.Thread()
        self._give_way = threading.Event()
        self._failing_since: float | None = None
        self._error: Exception | None = None

    def free(self, seconds: float) -> bool:
        """Whether another save can begin, after waiting at most so long for the one before.

        Raises StoreUnavailable when none could be stored for too long, CheckpointInvalid when another process trains
        the same run.
        """
        if self._failing_since is not None:
            self._give_way.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self.check()
        return not self._thread.is_alive()

    def begin(self, model: GPT, optimizer: torch.optim.Optimizer, about: dict[str, Any], kept: tuple[int, int]) -> None:
        """Take a snapshot, and store it in the background; `kept` is what retention is told.

        `about` is the record's but for files and metrics. `free` must have said that it can begin.
        """
        assert not self._thread.is_alive()
        files = self._snapshot.take(model, optimizer)
        self._give_way.clear()
        self._thread = threading.Thread(target=self._save, args=(files, about, self._log.unsaved(), kept), daemon=True)
        self._thread.start()

    def finish(self, *, giving_way: bool = False) -> None:
        """Wait until the last one is stored, or can give way to a newer. Raises what `free` raises."""
        while self._thread.is_alive():
            if giving_way and self._failing_since is not None:
                self._give_way.set()
            self._thread.join(1.0)
        self.check()

    def close(self) -> None:
        """Let the one in progress end, unless the store does not take it."""
        self._give_way.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Raises what `free` raises, without waiting for anything."""
        if self._error is not None:
            raise self._error

    def _save(self, files: dict[str, Body], about: dict[str, Any], lines: list[str], kept: tuple[int, int]) -> None:
        attempt = secrets.token_hex(6)  # one for all tries: what has been stored is not stored again
        try:
            while not self._stored(files, about, lines, attempt):
                if self._give_way.wait(RETRY_SECONDS):
                    return  # for a newer one
            self._retain(kept)
        except Exception as error:  # or a bug of ours: the training must not go on without checkpoints
            self._error = error

    def _retain(self, kept: tuple[int, int]) -> None:
        """Give up old checkpoints; those that the store keeps for now go with a later one's."""
        try:
            retain(self._store, self._run, *kept)
        except StorageError as error:
            print(f"old checkpoints of {self._run} could not be given up: {error}", flush=True)

    def _stored(self, files: dict[str, Body], about: dict[str, Any], lines: list[str], attempt: str) -> bool:
        """Try once. Raises CheckpointInvalid, and StoreUnavailable when patience has ended."""
        try:
            segments = self._log.put_segment(lines)
            record = put_checkpoint(self._store, self._run, files, about | {"metrics": segments}, attempt)
        except CheckpointInvalid:
            raise
        except StorageError as error:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            unsaved = now - self._failing_since
            if unsaved > self._unsaved_seconds:
                raise StoreUnavailable(
                    f"run {self._run!r}: no checkpoint could be stored for {unsaved / 60:.0f} minutes "
                    f"(resources.unsaved_minutes = {self._unsaved_seconds / 60:g}), the last try was that of step "
                    f"{about['step']:,}: {error} When the store is well again, run the same command: it goes on from "
                    f"the newest checkpoint."
                ) from error
            print(
                f"checkpoint of step {about['step']:,} is not stored yet, the training goes on "
                f"(for {(self._unsaved_seconds - unsaved) / 60:.0f} minutes at most): {error}",
                flush=True,
            )
            return False
        self._failing_since = None
        self._log.saved(len(lines), record.metrics)
        return True
