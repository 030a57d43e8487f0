"""The numbers people watch: one JSON line a step, kept until the next checkpoint carries them to the store.

Only the main rank has a log. It decides nothing and computes no loss, and no store makes the training wait for it.
"""

import json
import math
import secrets
import threading
import time
from typing import Any

from storage.digests import canonical_json
from storage.errors import StorageError
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite

PROGRESS_SECONDS = 10.0  # a live curve needs no more, and each is a write to the store
DRAWN = ("loss", "val_loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "data_seconds",
         "checkpoint_seconds", "memory_bytes")  # fmt: skip


class MetricsLog:
    """The lines since the last checkpoint, and the segments that are in the store already."""

    def __init__(
        self, store: Store, run: str, max_steps: int, segments: list[str], *, tensorboard: str = "", step: int = 0
    ) -> None:
        self._store = store
        self._run = run
        self._max_steps = max_steps
        self._lines: list[dict[str, Any]] = []
        self._progress_at = 0.0
        self._showing = threading.Thread()
        self._segments = list(segments)
        self._events = _event_file(tensorboard, run, step) if tensorboard else None

    def add(self, line: dict[str, Any]) -> None:
        """Keep one step's numbers, say them, and show them to those who watch from afar now and then."""
        self._lines.append(line)
        loss, norm = (math.nan if line[name] is None else line[name] for name in ("loss", "gradient_norm"))
        val_loss = f"  val loss {line['val_loss']:.4f}" if "val_loss" in line else ""
        mfu = f"  MFU {line['mfu']:.1%}" if "mfu" in line else ""
        print(
            f"step {line['step'] + 1:>6,}/{self._max_steps:,}  loss {loss:.4f}{val_loss}  "
            f"lr {line['learning_rate']:.2e}  norm {norm:.2f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s{mfu}{'  skipped' if line.get('skipped') else ''}",
            flush=True,
        )
        if self._events is not None:
            for name in DRAWN:
                if line.get(name) is not None:
                    self._events.add_scalar(name, line[name], line["step"] + 1)
        if time.monotonic() - self._progress_at >= PROGRESS_SECONDS and not self._showing.is_alive():
            self._progress_at = time.monotonic()
            self._showing = threading.Thread(target=self._show_progress, args=(list(self._lines),), daemon=True)
            self._showing.start()

    def unsaved(self) -> list[str]:
        """The lines since the last checkpoint, as JSON."""
        return [json.dumps(line, sort_keys=True) for line in self._lines]

    def put_segment(self, lines: list[str]) -> list[str]:
        """Put the lines as one more segment; returns the keys of all of them, for the checkpoint's record."""
        if not lines:
            return self._segments
        key = RunKeys(self._run).metrics_segment(json.loads(lines[0])["step"], secrets.token_hex(6))
        self._store.put_new(key, "".join(f"{line}\n" for line in lines).encode())
        return [*self._segments, key]

    def saved(self, count: int, segments: list[str]) -> None:
        """A checkpoint holds these segments, and in them the first `count` lines that were unsaved."""
        self._show_progress(self._lines[:count])
        del self._lines[:count]  # in place: the training adds lines meanwhile
        self._segments = segments

    def _show_progress(self, lines: list[dict[str, Any]]) -> None:
        """Swap the run's progress object: the last step done, the steps in all, and the lines since the checkpoint."""
        if not lines:
            return
        body = {"step": lines[-1]["step"] + 1, "max_steps": self._max_steps, "since_checkpoint": lines}
        try:
            overwrite(self._store, RunKeys(self._run).progress, canonical_json(body))
        except StorageError as error:
            print(f"progress could not be shown: {error}", flush=True)

    def close(self) -> None:
        """Write what is still to be drawn."""
        if self._events is not None:
            self._events.close()


def _event_file(folder: str, run: str, step: int) -> Any:
    """TensorBoard's writer; what an earlier process drew beyond the step that this one begins with is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"resources.tensorboard = {folder!r}: TensorBoard is not installed. Install it: "
            f"pip install 'gpt2-pipeline[tensorboard]', or leave the setting empty."
        ) from error
    return SummaryWriter(f"{folder}/{run}", purge_step=step + 1)
