"""The metrics of each step: printed, kept until a checkpoint stores them, shown live. Training never waits for it."""

import json
import math
import secrets
import threading
import time

from model.checkpoints.records import Progress, StepMetrics
from storage.digests import canonical_json
from storage.errors import StorageError
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite

PROGRESS_SECONDS = 10.0  # between writes of the live curve: each is a request to the store


class MetricsLog:
    """The metrics since the last checkpoint, and the keys of the stored segments."""

    def __init__(self, store: Store, run: str, max_steps: int, segments: list[str]) -> None:
        self._store, self._run, self._max_steps, self._segments = store, run, max_steps, segments
        self._unsaved: list[StepMetrics] = []
        self._progress_at = 0.0
        self._progress_thread = threading.Thread()

    def add(self, metrics: StepMetrics) -> None:
        """Keep and print the metrics of a step. At most every PROGRESS_SECONDS, also show them in the store."""
        self._unsaved.append(metrics)
        print(f"step {metrics.step + 1:>6,}/{self._max_steps:,}  {_line(metrics)}", flush=True)
        if time.monotonic() - self._progress_at >= PROGRESS_SECONDS and not self._progress_thread.is_alive():
            self._progress_at = time.monotonic()
            self._progress_thread = threading.Thread(target=self._show_progress, args=(self.unsaved(),), daemon=True)
            self._progress_thread.start()

    def unsaved(self) -> list[StepMetrics]:
        return list(self._unsaved)

    def put_segment(self, metrics: list[StepMetrics]) -> list[str]:
        """Store the metrics as a new segment. Returns the keys of all segments, for the checkpoint's record."""
        key = RunKeys(self._run).metrics_segment(metrics[0].step, secrets.token_hex(6))
        lines = (json.dumps(step_metrics.model_dump(), sort_keys=True) for step_metrics in metrics)
        self._store.put_new(key, "".join(f"{line}\n" for line in lines).encode())
        return [*self._segments, key]

    def saved(self, count: int, segments: list[str]) -> None:
        """Drop the first `count` unsaved metrics, which a checkpoint has stored in these segments."""
        self._show_progress(self._unsaved[:count])
        self._progress_at = time.monotonic()  # followers read these steps before the next progress replaces them
        del self._unsaved[:count]  # in place: the training thread appends meanwhile
        self._segments = segments

    def _show_progress(self, metrics: list[StepMetrics]) -> None:
        progress = Progress(step=metrics[-1].step + 1, max_steps=self._max_steps, since_checkpoint=metrics)
        try:
            overwrite(self._store, RunKeys(self._run).progress, canonical_json(progress.model_dump()))
        except StorageError as error:
            print(f"progress could not be shown: {error}", flush=True)


def _line(metrics: StepMetrics) -> str:
    """The metrics as they are printed; NaN for a loss or norm that is not finite."""
    loss, norm = (math.nan if value is None else value for value in (metrics.loss, metrics.gradient_norm))
    val_loss = "" if metrics.val_loss is None else f"  val loss {metrics.val_loss:.4f}"
    val_loss += "".join(f", {dataset} {loss:.4f}" for dataset, loss in metrics.val_losses.items())
    mfu = "" if metrics.mfu is None else f"  MFU {metrics.mfu:.1%}"
    skipped = "  skipped" if metrics.skipped else ""
    speed = f"{metrics.tokens_per_second:,.0f} tokens/s"
    return f"loss {loss:.4f}{val_loss}  lr {metrics.learning_rate:.2e}  norm {norm:.2f}  {speed}{mfu}{skipped}"
