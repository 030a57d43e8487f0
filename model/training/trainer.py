"""The training loop: steps, validation, checkpoints, and going on exactly where a killed one stood.

    batch of step k ─▶ forward, backward in micro-batches ─▶ clip ─▶ AdamW ─▶ metrics ─▶ checkpoint now and then

Knows no Prefect, no command line and no environment.
"""

import signal
import time
from contextlib import nullcontext
from math import isfinite
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from model.checkpoints.records import CheckpointRecord, read_segments
from model.config import ModelConfig, ResourcesConfig, TrainingConfig
from model.data.loader import DataLoader, MicroBatches
from model.evaluation.evaluator import Evaluator
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.runs.job import Job
from model.training.flops import flops_per_token, peak_flops
from model.training.metrics import MetricsLog
from model.training.optimizer import learning_rate, make_optimizer
from model.training.outliers import MEMORY_STEPS, Outliers
from model.training.resume import cursor_of, resume
from model.training.saver import Saver
from storage.datasets.manifest import Manifest, read_manifest
from storage.stores.store import Store

SAVE_WAIT_SECONDS = 1.0  # the least that a save may wait for the one before; else it waits as long as a step took


class Trainer:
    """One rank of one training. `fit` brings the run to its last step, from wherever it is."""

    def __init__(self, store: Store, job: Job, ddp: DDPConfig) -> None:
        self.store, self.job, self.ddp = store, job, ddp
        self.config = TrainingConfig.model_validate(job.recipe["train"] | job.how.get("train", {}))
        self.resources = ResourcesConfig.model_validate(job.how.get("resources", {}))
        self.micro_batches = self.config.micro_batches(ddp.ranks)
        manifest = read_manifest(store, job.recipe["dataset"], job.recipe["manifest"])
        self.loader = self._loader(manifest, "train")
        self._check_length()
        torch.manual_seed(self.config.seed)  # every rank draws the same initial weights
        self.model = GPT(ModelConfig.model_validate(job.recipe["model"]), self.config.dropout).to(ddp.device)
        self.optimizer = make_optimizer(self.model, self.config)
        self.step, resumed = resume(store, job, self.model, self.optimizer)
        self._check_agreed(resumed)
        self.evaluator = Evaluator(self.model, ddp, self.config.precision)
        self.val_loader = self._loader(manifest, "val") if self.config.validate_every_steps else None
        wanted = self.config.compile
        self._compiled = wanted == "on" or (wanted == "auto" and ddp.device.type == "cuda")
        self.parallel = self._parallel()
        self.outliers = self._outliers(resumed)
        self.log = MetricsLog(
            store, job.run, self.config.max_steps, resumed.metrics if resumed else [],
            tensorboard=self.resources.tensorboard if ddp.is_main else "", step=self.step,
        )  # fmt: skip
        self.saver = Saver(store, job.run, self.log, self.resources.unsaved_minutes * 60)
        self._stop_asked = False
        self._save_due = False
        self._seconds = {"data_seconds": 0.0, "metrics_seconds": 0.0, "checkpoint_seconds": 0.0}  # since the last line
        flops = flops_per_token(self.model.config, self.model.parameter_count, self.config.sequence_tokens)
        peak = peak_flops(ddp.device_name) if self.evaluator.precision == "bf16" else None
        self._mfu_of_speed = flops / (peak * ddp.ranks) if peak else None

    def fit(self) -> dict[str, Any] | None:
        """Train up to the last step. Returns the result, or None when a SIGTERM stopped it at a checkpoint."""
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        if self.ddp.is_main:
            compiled = "compiled" if self._compiled else "eager"
            print(f"{self.job.job_id}: {self.evaluator.precision}, {compiled}, from step {self.step:,}", flush=True)
        share = {"size": self.config.micro_batch_sequences, "rank": self.ddp.rank, "ranks": self.ddp.ranks}
        self.batches = MicroBatches(
            self.loader, self.ddp.device, step=self.step, batch_windows=self.config.batch_windows, **share,
            ahead=self.resources.prefetch_batches,
        )  # fmt: skip
        try:
            while self.step < self.config.max_steps:
                started = time.perf_counter()
                line, stopping = self._train_step()
                line["step_seconds"] = time.perf_counter() - started
                line["tokens_per_second"] = self.config.batch_tokens / line["step_seconds"]
                if self._mfu_of_speed:
                    line["mfu"] = line["tokens_per_second"] * self._mfu_of_speed
                if self.val_loader and self._due(self.config.validate_every_steps):
                    line["val_loss"] = self.evaluator.val_loss(self.val_loader, self.config.validation_tokens)["loss"]
                if self.ddp.is_main:
                    self._log_and_save(line, stopping=stopping)
                if stopping and self.step < self.config.max_steps:
                    return None
            tokens = self.step * self.config.batch_tokens
            return {"step": self.step, "tokens": tokens, "environment": self.ddp.environment}
        finally:
            self.batches.close()
            self.saver.close()
            self.log.close()
            if self.ddp.ranks == 1:  # else the others wait for the main rank's last save: it is no time to be killed
                signal.signal(signal.SIGTERM, before)

    def _train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer update. Returns its numbers and whether any rank was asked to stop."""
        torch.manual_seed(self._step_seed())
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        exact = torch.float32 if self.ddp.device.type == "mps" else torch.float64  # MPS has no float64
        sums = torch.zeros(3, dtype=exact, device=self.ddp.device)
        for index in range(self.micro_batches):
            waited = time.perf_counter()
            tokens_BT, targets_BT = self.batches.next()
            self._seconds["data_seconds"] += time.perf_counter() - waited
            last = index == self.micro_batches - 1
            with self._no_sync() if not last else nullcontext(), self.evaluator.autocast():
                loss = self.parallel(tokens_BT, targets_BT)
                # DDP averages over ranks: with this scale the gradient is that of the mean over the whole batch
                (loss * (self.ddp.ranks / self.config.batch_tokens)).backward()
            sums[0] += loss.detach()
        sums[1] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip) / self.ddp.ranks
        sums[2] = float(self._stop_asked)
        total, norm, stop = self.ddp.sum(sums).tolist()  # the one moment of a step at which a GPU is waited for
        line = {
            "step": self.step,
            "loss": total / self.config.batch_tokens if isfinite(total) else None,
            "learning_rate": rate,
            "gradient_norm": norm if isfinite(norm) else None,
        }
        if self._is_outlier(total, norm):
            line["skipped"] = True
        else:
            self.optimizer.step()
        self.step += 1
        return line, stop > 0

    def _step_seed(self) -> int:
        """What this rank draws in this step (dropout) depends on nothing else, so a resume needs no generator state."""
        words = np.random.SeedSequence([self.config.seed, self.step, self.ddp.rank]).generate_state(2)
        return int(words[0]) << 31 | int(words[1]) >> 1

    def _is_outlier(self, loss: float, norm: float) -> bool:
        """Whether this step is to be left out. Raises ValueError for one that is no number when none may be."""
        allowed = self.config.skip_outlier_steps
        if allowed and not self.outliers.judge(loss, norm):
            return False
        finite = isfinite(loss) and isfinite(norm)
        if self.outliers.skipped < allowed:
            self.outliers.skipped += 1
            return True
        if finite:
            return False
        windows = self.config.batch_windows
        first = self.step * windows
        shards = self.loader.shards_of(first, windows)
        more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
        raise ValueError(
            f"step {self.step:,} of run {self.job.run!r}: a finite loss and gradient were expected, found a summed "
            f"loss of {loss} and a gradient norm of {norm}{f' after {allowed} skipped steps' * bool(allowed)}. Its "
            f"batch is windows {first:,} to {first + windows - 1:,} of manifest {self.job.recipe['manifest'][:12]}, "
            f"in {', '.join(shards[:3])}{more}: gpt2 dataset trace --step {self.step} shows their documents. Try a "
            f"smaller train.learning_rate, a longer warm-up or train.skip_outlier_steps in a new run."
        )

    def _log_and_save(self, line: dict[str, Any], *, stopping: bool) -> None:
        """On the main rank: the line with the seconds that it cost, and a checkpoint when one is due.

        A save waits for the one before as long as a step takes, then a later step tries again.
        """
        line |= self._seconds | {"memory_bytes": self.ddp.memory_bytes()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        started = time.perf_counter()
        self.log.add(line)
        logged = time.perf_counter()
        self._seconds["metrics_seconds"] = logged - started
        ending = stopping or self.step == self.config.max_steps
        self._save_due |= ending or self._due(self.config.checkpoint_every_steps)
        patience = max(line["step_seconds"], SAVE_WAIT_SECONDS)
        self.saver.check()  # a training whose checkpoints are refused for good ends now, not when the next is due
        if self._save_due:
            if ending:
                self.saver.finish(giving_way=True)
            if ending or self.saver.free(patience):
                self._save_due = False
                self.saver.begin(self.model, self.optimizer, self._about(), self._kept())
        if ending:
            self.saver.finish()
        self._seconds["checkpoint_seconds"] = time.perf_counter() - logged

    def _about(self) -> dict[str, Any]:
        recipe = self.job.recipe
        return {
            "step": self.step,
            "job": self.job.job_id,
            "model": recipe["model"],
            "train": recipe["train"],
            "cursor": cursor_of(self.job) | {"next_window": self.step * self.config.batch_windows},
        }

    def _kept(self) -> tuple[int, int]:
        return self.config.keep_last, self.config.keep_every_steps

    def _check_agreed(self, resumed: CheckpointRecord | None) -> None:
        """Each rank has looked by itself, and a process that was thought dead may have saved meanwhile."""
        if not self.ddp.agree(int(resumed.attempt, 16) if resumed else 0):
            found = f"step {resumed.step:,}" if resumed else "none"
            raise ValueError(
                f"run {self.job.run!r}: one newest checkpoint was expected by all ranks, rank {self.ddp.rank} found "
                f"{found}: another process is still saving. When it has ended, run the same command again."
            )

    def _check_length(self) -> None:
        order = self.loader.order
        if order.epoch_windows < self.config.batch_windows:
            fitting = order.epoch_windows * self.config.sequence_tokens
            raise ValueError(
                f"train.batch_tokens = {self.config.batch_tokens:,}: the train split of dataset "
                f"{self.job.recipe['dataset']!r} has {order.epoch_windows:,} windows of "
                f"{self.config.sequence_tokens:,} tokens, less than one batch. Use at most train.batch_tokens = "
                f"{fitting:,}, fewer data.val_shards, or more text."
            )

    def _outliers(self, resumed: CheckpointRecord | None) -> Outliers:
        """As the steps before have left it; they are read only where outliers may be skipped."""
        lines = read_segments(self.store, resumed.metrics) if resumed and self.config.skip_outlier_steps else []
        taken = [line["gradient_norm"] for line in lines if not line.get("skipped")]
        return Outliers(taken[-MEMORY_STEPS:], sum(bool(line.get("skipped")) for line in lines))

    def _loader(self, manifest: Manifest, split: str) -> DataLoader:
        shape = {"sequence_tokens": self.config.sequence_tokens, "seed": self.config.seed}
        shape["cache_bytes"] = self.resources.cache_bytes
        return DataLoader(self.store, self.job.recipe["dataset"], manifest, split, **shape)

    def _parallel(self) -> torch.nn.Module:
        """The model, compiled where that is asked for, and synchronised where there are several ranks."""
        model: Any = torch.compile(self.model) if self._compiled else self.model
        return DistributedDataParallel(model, forward_sync_buffers=False) if self.ddp.ranks > 1 else model

    def _no_sync(self) -> Any:
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def _due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.config.max_steps

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        self._stop_asked = True
