"""The numbers people watch: one JSON line a step, kept until the next checkpoint carries them to the store.

Only the main rank has a log. It decides nothing and computes no loss.
"""

import json
import secrets
import time
from typing import Any

from storage import keys
from storage.canonical import canonical_json
from storage.store import Store, overwrite

PROGRESS_SECONDS = 10.0  # a live curve needs no more, and each is a write to the store


class MetricsLog:
    """The lines since the last checkpoint, and the segments that are in the store already."""

    def __init__(self, store: Store, run: str, max_steps: int, segments: list[str]) -> None:
        self._store = store
        self._run = run
        self._max_steps = max_steps
        self._lines: list[dict[str, Any]] = []
        self._progress_at = 0.0
        self.segments = list(segments)

    def add(self, line: dict[str, Any]) -> None:
        """Keep one step's numbers, say them, and show them to those who watch from afar now and then."""
        self._lines.append(line)
        val_loss = f"  val loss {line['val_loss']:.4f}" if "val_loss" in line else ""
        print(
            f"step {line['step'] + 1:>6,}/{self._max_steps:,}  loss {line['loss']:.4f}{val_loss}  "
            f"lr {line['learning_rate']:.2e}  norm {line['gradient_norm']:.2f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s",
            flush=True,
        )
        if time.monotonic() - self._progress_at >= PROGRESS_SECONDS:
            self._progress_at = time.monotonic()
            self.show_progress()

    def show_progress(self) -> None:
        """Swap the run's progress object: the last step done, the steps in all, and the lines since the checkpoint."""
        body = {"step": self._lines[-1]["step"] + 1, "max_steps": self._max_steps, "since_checkpoint": self._lines}
        overwrite(self._store, keys.progress(self._run), canonical_json(body))

    def put_segment(self) -> list[str]:
        """Put the lines since the last checkpoint; returns all segments so far, for the checkpoint's record."""
        if self._lines:
            key = keys.metrics(self._run, self._lines[0]["step"], secrets.token_hex(6))
            body = "".join(json.dumps(line, sort_keys=True) + "\n" for line in self._lines)
            self._store.put_new(key, body.encode())
            self.show_progress()
            self.segments.append(key)
            self._lines = []
        return self.segments
