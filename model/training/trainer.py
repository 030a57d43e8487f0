"""The training loop: steps, validation and checkpoints. `setup.py` assembles it.

    batch of step k ─▶ forward, backward in micro-batches ─▶ clip ─▶ AdamW ─▶ metrics ─▶ checkpoint now and then

Knows no Prefect, command line or environment.
"""

import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from types import FrameType
from typing import Any

import numpy as np
import torch

from model.checkpoints.records import CheckpointRecord
from model.config import TrainingConfig
from model.data.loader import DataLoader, MicroBatches
from model.evaluation.evaluator import Evaluator
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.runs.job import Job
from model.training.metrics import MetricsLog, StepMetrics
from model.training.outliers import Outliers, divergence
from model.training.resume import cursor_of
from model.training.saver import Saver
from model.training.schedule import learning_rate

SAVE_WAIT_SECONDS = 1.0  # shortest wait for the save before; usually a save waits as long as a step takes


@dataclass
class Seconds:
    """Time spent beside computing since the last metrics were logged."""

    data: float = 0.0
    metrics: float = 0.0
    checkpoint: float = 0.0


@dataclass(eq=False)
class Trainer:
    """One rank of one training. `fit` brings the run from `step` to its last step."""

    job: Job
    config: TrainingConfig
    ddp: DDPConfig
    model: GPT
    parallel: torch.nn.Module  # the model, compiled and synchronised over the ranks
    optimizer: torch.optim.Optimizer
    micro_batches: int  # of one step on this rank
    loader: DataLoader
    val_loader: DataLoader | None
    prefetch_batches: int
    evaluator: Evaluator
    outliers: Outliers
    log: MetricsLog
    saver: Saver
    step: int
    mfu_per_speed: float | None
    _stop_requested: bool = field(default=False, init=False)
    _save_due: bool = field(default=False, init=False)
    _seconds: Seconds = field(default_factory=Seconds, init=False)

    def fit(self) -> dict[str, Any] | None:
        """Train to the last step. Returns the result, or None if a SIGTERM stopped it at a checkpoint."""
        handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        self.batches = MicroBatches(
            self.loader, self.ddp.device, step=self.step, batch_windows=self.config.batch_windows,
            size=self.config.micro_batch_sequences, rank=self.ddp.rank, ranks=self.ddp.ranks,
            ahead=self.prefetch_batches,
        )  # fmt: skip
        try:
            while self.step < self.config.max_steps:
                started = time.perf_counter()
                metrics, stopping = self._train_step()
                metrics = self._timed(metrics, time.perf_counter() - started)
                if self.val_loader and self._is_due(self.config.validate_every_steps):
                    val_loss = self.evaluator.val_loss(self.val_loader, self.config.validation_tokens).loss
                    metrics = replace(metrics, val_loss=val_loss)
                if self.ddp.is_main:
                    self._log_and_save(metrics, stopping=stopping)
                if stopping and self.step < self.config.max_steps:
                    return None
            tokens = self.step * self.config.batch_tokens
            return {"step": self.step, "tokens": tokens, "environment": self.ddp.environment}
        finally:
            self.batches.close()
            self.saver.close()
            self.log.close()
            if self.ddp.ranks == 1:  # with several ranks, rank 0 may still be saving, and a SIGTERM would kill it
                signal.signal(signal.SIGTERM, handler)

    def _train_step(self) -> tuple[StepMetrics, bool]:
        """One optimizer step. Returns its metrics, and whether any rank was told to stop."""
        torch.manual_seed(self._step_seed())
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, norm, stopping = self._gradients()
        skipped = self.outliers.skip(loss, norm)
        if not skipped:
            self._check_finite(loss, norm)
            self.optimizer.step()
        metrics = StepMetrics(
            step=self.step,
            loss=loss / self.config.batch_tokens if isfinite(loss) else None,
            learning_rate=rate,
            gradient_norm=norm if isfinite(norm) else None,
            skipped=skipped,
        )
        self.step += 1
        return metrics, stopping

    def _gradients(self) -> tuple[float, float, bool]:
        """Forward and backward of the step's batch. Returns the summed loss, the gradient norm, whether to stop."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        exact = torch.float32 if self.ddp.device.type == "mps" else torch.float64  # MPS has no float64
        sums = torch.zeros(3, dtype=exact, device=self.ddp.device)
        for index in range(self.micro_batches):
            waiting = time.perf_counter()
            tokens_BT, targets_BT = self.batches.next()
            self._seconds.data += time.perf_counter() - waiting
            is_last = index == self.micro_batches - 1
            with self._synchronised(is_last), self.evaluator.autocast():
                loss = self.parallel(tokens_BT, targets_BT)
                # DDP averages over ranks: with this scale the gradient is that of the mean over the whole batch
                (loss * (self.ddp.ranks / self.config.batch_tokens)).backward()
            sums[0] += loss.detach()
        sums[1] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip) / self.ddp.ranks
        sums[2] = float(self._stop_requested)
        total, norm, stop = self.ddp.sum(sums).tolist()  # the only time in a step that the CPU waits for the GPU
        return total, norm, stop > 0

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """Let DDP sum gradients over the ranks only after the last micro-batch of a step."""
        if is_last or self.ddp.ranks == 1:
            return nullcontext()
        context: AbstractContextManager[Any] = self.parallel.no_sync()  # type: ignore[operator]
        return context

    def _step_seed(self) -> int:
        """The seed of dropout: it depends on seed, step and rank alone, so a resume needs no generator state."""
        bits = np.random.SeedSequence([self.config.seed, self.step, self.ddp.rank]).generate_state(2)
        return int(bits[0]) << 31 | int(bits[1]) >> 1

    def _check_finite(self, loss: float, norm: float) -> None:
        if isfinite(loss) and isfinite(norm):
            return
        first, count = self.step * self.config.batch_windows, self.config.batch_windows
        raise divergence(
            self.job.run, self.step, loss, norm, skipped=self.outliers.skipped, windows=range(first, first + count),
            manifest=self.job.recipe["manifest"], shards=self.loader.shards_of(first, count),
        )  # fmt: skip

    def _timed(self, metrics: StepMetrics, seconds: float) -> StepMetrics:
        """The metrics with the time and speed of the step."""
        speed = self.config.batch_tokens / seconds
        mfu = speed * self.mfu_per_speed if self.mfu_per_speed else None
        return replace(metrics, step_seconds=seconds, tokens_per_second=speed, mfu=mfu)

    def _log_and_save(self, metrics: StepMetrics, *, stopping: bool) -> None:
        """On the main rank: log the metrics, and save a checkpoint if one is due.

        A save waits for the one before as long as a step takes. If that is still running, the next step tries again.
        """
        metrics = replace(
            metrics,
            data_seconds=self._seconds.data,
            metrics_seconds=self._seconds.metrics,
            checkpoint_seconds=self._seconds.checkpoint,
            memory_bytes=self.ddp.memory_bytes(),
        )
        self._seconds = Seconds()
        started = time.perf_counter()
        self.log.add(metrics)
        logged = time.perf_counter()
        self._seconds.metrics = logged - started
        self.saver.check()  # ends a training whose saves fail for good at once, not when the next is due
        ending = stopping or self.step == self.config.max_steps
        self._save_due |= ending or self._is_due(self.config.checkpoint_every_steps)
        if self._save_due:
            wait_seconds = inf if ending else max(metrics.step_seconds, SAVE_WAIT_SECONDS)
            saving = self.saver.save(self.model, self.optimizer, self._record(), wait_seconds=wait_seconds)
            self._save_due = not saving
        if ending:
            self.saver.finish()
        self._seconds.checkpoint = time.perf_counter() - logged

    def _record(self) -> CheckpointRecord:
        recipe, next_window = self.job.recipe, self.step * self.config.batch_windows
        return CheckpointRecord(
            self.step, self.job.job_id, recipe["model"], recipe["train"], cursor_of(self.job, next_window)
        )

    def _is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.config.max_steps

    def _on_sigterm(self, _signum: int, _frame: FrameType | None) -> None:
        self._stop_requested = True
