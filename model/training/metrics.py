"""The metrics of each step: printed, kept until a checkpoint stores them, and shown live in the store and TensorBoard.

Only the main rank has a log. It computes nothing, and the training never waits for the store.
"""

import json
import math
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from storage.digests import canonical_json
from storage.errors import StorageError
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite

PROGRESS_SECONDS = 10.0  # between writes of the live curve: each is a request to the store
DRAWN = ("loss", "val_loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "data_seconds",
         "checkpoint_seconds", "memory_bytes")  # fmt: skip


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of one step. `metrics_seconds` and `checkpoint_seconds` were spent after the step before."""

    step: int
    loss: float | None  # None: NaN or infinite
    learning_rate: float
    gradient_norm: float | None  # None: NaN or infinite
    skipped: bool = False
    val_loss: float | None = None
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float | None = None
    data_seconds: float = 0.0  # waiting for batches
    metrics_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    memory_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """As the store holds it: without `val_loss` and `mfu` if unknown, with `skipped` only if true."""
        values = asdict(self)
        for name in ("skipped", "val_loss", "mfu"):
            if values[name] is None or values[name] is False:
                del values[name]
        return values

    def __str__(self) -> str:
        loss, norm = (math.nan if value is None else value for value in (self.loss, self.gradient_norm))
        parts = [f"loss {loss:.4f}"]
        if self.val_loss is not None:
            parts.append(f"val loss {self.val_loss:.4f}")
        mfu = "" if self.mfu is None else f"  MFU {self.mfu:.1%}"
        parts += [f"lr {self.learning_rate:.2e}", f"norm {norm:.2f}", f"{self.tokens_per_second:,.0f} tokens/s{mfu}"]
        if self.skipped:
            parts.append("skipped")
        return "  ".join(parts)


@dataclass(frozen=True)
class Progress:
    """The run's live progress: steps done, steps in all, and the metrics since the last checkpoint."""

    step: int
    max_steps: int
    since_checkpoint: list[dict[str, Any]]


class MetricsLog:
    """The metrics since the last checkpoint, and the keys of the segments that are stored already."""

    def __init__(
        self, store: Store, run: str, max_steps: int, segments: list[str], *, tensorboard: str = "", step: int = 0
    ) -> None:
        self._store, self._run, self._max_steps = store, run, max_steps
        self._unsaved: list[dict[str, Any]] = []
        self._segments = list(segments)
        self._progress_at = 0.0
        self._progress_thread = threading.Thread()
        self._events = _event_file(tensorboard, run, step) if tensorboard else None

    def add(self, metrics: StepMetrics) -> None:
        """Keep and print the metrics of a step. At most every PROGRESS_SECONDS, also show them in the store."""
        values = metrics.to_json()
        self._unsaved.append(values)
        print(f"step {metrics.step + 1:>6,}/{self._max_steps:,}  {metrics}", flush=True)
        if self._events is not None:
            for name in DRAWN:
                if values.get(name) is not None:
                    self._events.add_scalar(name, values[name], metrics.step + 1)
        if time.monotonic() - self._progress_at >= PROGRESS_SECONDS and not self._progress_thread.is_alive():
            self._progress_at = time.monotonic()
            arguments = (list(self._unsaved),)
            self._progress_thread = threading.Thread(target=self._show_progress, args=arguments, daemon=True)
            self._progress_thread.start()

    def unsaved(self) -> list[str]:
        """The lines since the last checkpoint, as JSON."""
        return [json.dumps(values, sort_keys=True) for values in self._unsaved]

    def put_segment(self, lines: list[str]) -> list[str]:
        """Store the lines as a new segment. Returns the keys of all segments, for the checkpoint's record."""
        if not lines:
            return self._segments
        key = RunKeys(self._run).metrics_segment(json.loads(lines[0])["step"], secrets.token_hex(6))
        self._store.put_new(key, "".join(f"{line}\n" for line in lines).encode())
        return [*self._segments, key]

    def saved(self, count: int, segments: list[str]) -> None:
        """Note that a checkpoint has these segments, and in them the first `count` unsaved lines."""
        self._show_progress(self._unsaved[:count])
        del self._unsaved[:count]  # in place: the training thread appends meanwhile
        self._segments = segments

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self._events is not None:
            self._events.close()

    def _show_progress(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        progress = Progress(lines[-1]["step"] + 1, self._max_steps, lines)
        try:
            overwrite(self._store, RunKeys(self._run).progress, canonical_json(asdict(progress)))
        except StorageError as error:
            print(f"progress could not be shown: {error}", flush=True)


def _event_file(folder: str, run: str, step: int) -> Any:
    """TensorBoard's writer. It hides what an earlier process drew beyond `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"resources.tensorboard = {folder!r}: TensorBoard is not installed. Install it: "
            f"pip install 'gpt2-pipeline[tensorboard]', or leave the setting empty."
        ) from error
    return SummaryWriter(f"{folder}/{run}", purge_step=step + 1)
