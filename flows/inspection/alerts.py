"""What a person should know about a training while it runs: each alert once, again only after its condition cleared."""

from collections import deque
from collections.abc import Iterator
from math import inf
from statistics import median

from flows.inspection.doctor import FREE_BYTES
from model.checkpoints.records import StepMetrics
from model.config import RunConfig

LOSSES, FEWEST_LOSSES = 128, 32  # as for gradient norms: model/training/outliers.py
SPIKE_NATS, SPIKE_DEVIATIONS = 0.5, 10  # above the median; of small batches, the median deviation is up to 0.2
RISING_NATS, RISING_VALIDATIONS = 0.01, 3  # above the best val loss, in a row
SPEEDS, RECENT_SPEEDS = 1_000, 50  # a busy host slows some steps
CLEAR = {"spike": 20, "slow": 50, "disk": 60}  # how often a condition must be false before it counts as cleared


class Alerts:
    """Watches one training. `after` and `at` return new alerts."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._step, self._step_seconds = config, -1, 0.0
        self._losses, self._speeds = deque[float](maxlen=LOSSES), deque[float](maxlen=SPEEDS)
        self._val_losses, self._best_val_loss = deque[float](maxlen=RISING_VALIDATIONS), inf
        self._times_clear: dict[str, float] = {}

    def after(self, lines: list[StepMetrics]) -> list[str]:
        """New alerts after these steps. Steps of an earlier call are ignored."""
        return [alert for line in lines if line.step > self._step for alert in self._after(line)]

    def at(self, unsaved_seconds: float, free_bytes: int) -> list[str]:
        """New alerts this long after the last checkpoint, with this space on the disk."""
        usual_seconds = self._config.train.checkpoint_every_steps * self._step_seconds
        is_late = unsaved_seconds > max(3 * usual_seconds, 30 * self._config.resources.unsaved_minutes)
        late = f"no checkpoint was stored for {unsaved_seconds / 60:.0f} minutes. See the log, and gpt2 doctor"
        full = f"the disk is nearly full: {free_bytes / 1e9:.1f} GB are free. gpt2 gc lists what may be deleted"
        return self._new("late", is_late, late) + self._new("disk", free_bytes < FREE_BYTES, full)

    def _after(self, line: StepMetrics) -> Iterator[str]:
        self._step, self._step_seconds, step = line.step, line.step_seconds, f"step {line.step + 1:,}"
        skipped = f"{step} was skipped: its loss or gradient norm is NaN, infinite or an outlier"
        yield from self._new("skipped", line.skipped, skipped)
        if line.loss is not None:
            usual = median(self._losses) if len(self._losses) >= FEWEST_LOSSES else inf
            deviation = median(abs(loss - usual) for loss in self._losses) if usual < inf else 0.0
            is_spike = line.loss > usual + max(SPIKE_NATS, SPIKE_DEVIATIONS * deviation)
            yield from self._new("spike", is_spike, f"loss spike: {line.loss:.3f} at {step}, usually {usual:.3f}")
            self._losses.extend([] if is_spike else [line.loss])
        if line.val_loss is not None:
            self._val_losses.append(line.val_loss)
            rises = f"val loss rises: {line.val_loss:.4f} at {step}, the best was {self._best_val_loss:.4f}"
            yield from self._new("rising", min(self._val_losses) > self._best_val_loss + RISING_NATS, rises)
            self._best_val_loss = min(self._best_val_loss, line.val_loss)
        self._speeds.append(line.tokens_per_second)
        speed, usual = median([*self._speeds][-RECENT_SPEEDS:]), median(self._speeds)
        fell = f"throughput fell to {speed:,.0f} tokens/s at {step}, usually {usual:,.0f}"
        yield from self._new("slow", speed < usual / 2, fell)

    def _new(self, name: str, holds: bool, alert: str) -> list[str]:
        times_clear = self._times_clear.get(name, inf)
        self._times_clear[name] = 0 if holds else times_clear + 1
        return [alert] if holds and times_clear >= CLEAR.get(name, 1) else []
