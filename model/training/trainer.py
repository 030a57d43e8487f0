"""The trainer: assembled from its parts, then the loop of steps, validations and checkpoints.

batch of step k ─▶ forward, backward in micro-batches ─▶ clip ─▶ AdamW ─▶ metrics ─▶ checkpoint if one is due
"""

import signal
import time
from contextlib import nullcontext
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from model.checkpoints.records import CheckpointRecord, StepMetrics, read_segments
from model.config import ModelConfig, TrainingConfig
from model.data.loader import DataLoader
from model.evaluation.evaluator import Evaluator
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.processes.parent import stop_signals
from model.runs.job import Job, TrainingResult
from model.training.flops import flops_per_token, peak_flops
from model.training.metrics import MetricsLog
from model.training.micro_batch import Speed, choose_sequences, put_speed
from model.training.optimizer import learning_rate, make_optimizer
from model.training.outliers import Outliers
from model.training.resume import cursor_of, resume
from model.training.saver import Saver
from storage.loading.mix import weighted_mean
from storage.loading.windows import MixedWindows
from storage.stores.store import Store, overwrite

SAVE_WAIT_SECONDS = 1.0  # shortest wait for the previous save; usually a save waits as long as a step takes


class Trainer:
    """One rank of a training. Raises ValueError if settings do not fit the dataset or this host, and as `resume`."""

    def __init__(self, store: Store, job: Job, ddp: DDPConfig) -> None:
        self.store, self.job, self.ddp = store, job, ddp
        self.config = config = TrainingConfig.model_validate(job.recipe["train"] | job.how.train)
        self.resources = resources = job.how.resources
        config.micro_batches(ddp.ranks)  # raises ValueError if this is not a whole number
        options = {"sequence_tokens": config.sequence_tokens, "seed": config.seed, "cache_bytes": resources.cache_bytes}
        self.windows = MixedWindows(store, job.mix, "train", **options)
        self._check_length()
        self.val_windows = MixedWindows(store, job.mix, "val", **options) if config.validate_every_steps else None
        torch.manual_seed(config.seed)  # every rank draws the same initial weights
        self.model = GPT(ModelConfig.model_validate(job.recipe["model"]), config.dropout).to(ddp.device)
        self.flops_per_token = flops_per_token(self.model.config, config.sequence_tokens)
        self.optimizer = make_optimizer(self.model, config)
        self.step, segments = resume(store, job, ddp, self.model, self.optimizer)
        past = read_segments(store, segments) if config.skip_outlier_steps or config.patience_validations else []
        norms = [line.gradient_norm for line in past if line.gradient_norm is not None and not line.skipped]
        self.outliers = Outliers(config.skip_outlier_steps, norms, sum(line.skipped for line in past))
        self.val_losses = [line.val_loss for line in past if line.val_loss is not None]
        self.evaluator = Evaluator(self.model, ddp, config.precision)
        compiled = config.compile == "on" or (config.compile == "auto" and ddp.device.type == "cuda")
        self.setup = ddp.environment | config.model_dump(include={"sequence_tokens", "batch_tokens", "dropout"})
        self.setup |= {"threads": torch.get_num_threads(), "model": job.recipe["model"]}
        self.setup |= {"precision": self.evaluator.precision, "compiled": compiled}
        self.sequences = config.micro_batch_sequences or choose_sequences(store, self.evaluator, config, self.setup)
        self.micro_batches = config.batch_windows // ddp.ranks // self.sequences  # of one step on this rank
        self.parallel: Any = torch.compile(self.model) if compiled else self.model
        if ddp.ranks > 1:
            self.parallel = DistributedDataParallel(self.parallel, forward_sync_buffers=False)
        self.log = MetricsLog(store, job.run, config.max_steps, segments)
        self.saver = Saver(store, job.run, self.log, config, resources.unsaved_minutes)
        self._stop_requested = self._save_due = False
        self._seconds: dict[str, Any] = {}  # of data, and of metrics and checkpoint after the previous step
        if ddp.is_main:
            mode = f"{'compiled' if compiled else 'eager'}, micro-batches of {self.sequences}"
            print(f"{job.job_id}: {self.evaluator.precision}, {mode}, from step {self.step:,}", flush=True)

    def fit(self) -> TrainingResult | None:
        """Train until `is_finished`, or save and return None after a signal. Raises ValueError if the loss diverges."""
        handlers = {signum: signal.signal(signum, self._on_stop_signal) for signum in stop_signals()}
        self.batches = self._loader()
        try:
            while not self.is_finished:
                metrics, stopping = self._train_step()
                if self.val_windows and self._is_due(self.config.validate_every_steps):
                    self._validate(self.val_windows, metrics)
                if self.ddp.is_main:
                    self._log_and_save(metrics, stopping=stopping)
                if stopping and not self.is_finished:
                    return None
            return TrainingResult(self.step, self.step * self.config.batch_tokens, self.ddp.environment)
        finally:
            self.batches.close()
            self.saver.close()
            for signum, handler in handlers.items() if self.ddp.ranks == 1 else ():
                signal.signal(signum, handler)  # with several ranks it would kill this rank while rank 0 still saves

    @property
    def is_finished(self) -> bool:
        """Whether the run has made its last step, or its val losses use up its patience. The same on all ranks."""
        losses, patience = self.val_losses, self.config.patience_validations
        is_early = 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])
        return is_early or self.step == self.config.max_steps

    def _loader(self) -> DataLoader:
        return DataLoader(
            self.windows, self.ddp.device, step=self.step, batch_windows=self.config.batch_windows,
            size=self.sequences, rank=self.ddp.rank, ranks=self.ddp.ranks, ahead=self.resources.prefetch_batches,
        )  # fmt: skip

    def _validate(self, val_windows: MixedWindows, metrics: StepMetrics) -> None:
        limit, splits = self.config.validation_tokens, val_windows.splits.items()
        losses = {dataset: self.evaluator.val_loss(split, limit).loss for dataset, split in splits}
        val_loss = weighted_mean(losses, self.job.mix)
        if isfinite(val_loss):  # otherwise the next step raises an error
            metrics.val_loss, metrics.val_losses = val_loss, losses if self.config.mix else {}
            self.val_losses.append(val_loss)

    def _train_step(self) -> tuple[StepMetrics, bool]:
        """One optimizer step. Returns its metrics, and whether any rank was told to stop."""
        started = time.perf_counter()
        # The seed of dropout depends on seed, step and rank alone, so a resume needs no generator state
        bits = np.random.SeedSequence([self.config.seed, self.step, self.ddp.rank]).generate_state(2)
        torch.manual_seed(int(bits[0]) << 31 | int(bits[1]) >> 1)
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, norm, stopping = self._gradients()
        except torch.OutOfMemoryError:
            if self.config.micro_batch_sequences or self.sequences == 1:
                raise
            loss = None
        if loss is None:  # not in `except`, where the error holds the tensors of the failed pass
            self._halve_micro_batch()
            return self._train_step()
        skipped = self.outliers.skip(loss, norm)
        if not skipped:
            if not (isfinite(loss) and isfinite(norm)):
                raise self._divergence(loss, norm)
            self.optimizer.step()
        seconds = time.perf_counter() - started
        speed = self.config.batch_tokens / seconds
        peak = peak_flops(self.ddp.device_name) if self.evaluator.precision == "bf16" else None
        metrics = StepMetrics(
            step=self.step,
            loss=loss / self.config.batch_tokens if isfinite(loss) else None,
            learning_rate=rate,
            gradient_norm=norm if isfinite(norm) else None,
            skipped=skipped,
            step_seconds=seconds,
            tokens_per_second=speed,
            mfu=speed * self.flops_per_token / (peak * self.ddp.ranks) if peak else None,
            epochs=self.windows.epochs((self.step + 1) * self.config.batch_windows) if self.config.mix else {},
            **self._seconds,
        )
        self.step += 1
        return metrics, stopping

    def _halve_micro_batch(self) -> None:
        """Halve it for this start and later ones. Raises ValueError if other ranks wait for this one's gradients."""
        problem = f"step {self.step + 1:,}: memory ran out with {self.sequences} sequences per micro-batch"
        self.sequences, self.micro_batches = self.sequences // 2, self.micro_batches * 2
        put_speed(self.store, Speed(self.setup, self.sequences), overwrite)
        if self.ddp.ranks > 1:
            raise ValueError(f"{problem}. Run the same command again: it resumes with {self.sequences}.")
        print(f"{problem}; going on with {self.sequences}", flush=True)
        self.batches.close()
        self.batches = self._loader()

    def _gradients(self) -> tuple[float, float, bool]:
        """Run forward and backward over the batch. Returns the summed loss, the gradient norm and whether to stop."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        exact = torch.float32 if self.ddp.device.type == "mps" else torch.float64  # MPS has no float64
        sums = torch.zeros(3, dtype=exact, device=self.ddp.device)
        self._seconds["data_seconds"] = 0.0
        for index in range(self.micro_batches):
            waiting = time.perf_counter()
            tokens_BT, targets_BT = self.batches.next()
            self._seconds["data_seconds"] += time.perf_counter() - waiting
            # DDP synchronises gradients only after the last micro-batch
            is_synchronised = self.ddp.ranks == 1 or index == self.micro_batches - 1
            with nullcontext() if is_synchronised else self.parallel.no_sync(), self.evaluator.autocast():
                loss = self.parallel(tokens_BT, targets_BT)
                # DDP averages over ranks: with this scale the gradient is that of the mean over the whole batch
                (loss * (self.ddp.ranks / self.config.batch_tokens)).backward()
            sums[0] += loss.detach()
        sums[1] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip) / self.ddp.ranks
        sums[2] = float(self._stop_requested)
        total, norm, stop = self.ddp.sum(sums).tolist()  # the only time in a step that the CPU waits for the GPU
        return total, norm, stop > 0

    def _check_length(self) -> None:
        config, period = self.config, sum(share.weight for share in self.job.mix.values())
        for dataset, share in self.job.mix.items():
            windows = self.windows.splits[dataset].order.epoch_windows
            most_windows = windows * period // share.weight
            if most_windows < config.batch_windows:
                split = f"the train split of dataset {dataset!r}"
                length = f"only {windows:,} windows of {config.sequence_tokens:,} tokens, fewer than one batch reads"
                most = f"train.batch_tokens = {most_windows * config.sequence_tokens}"
                remedy = f"Start a new run with at most {most}, more text or a smaller val split."
                raise ValueError(f"train.batch_tokens = {config.batch_tokens:,}: {split} has {length}. {remedy}")

    def _divergence(self, loss: float, norm: float) -> ValueError:
        after = f" after {self.outliers.skipped} skipped steps" if self.outliers.skipped else ""
        first, count = self.step * self.config.batch_windows, self.config.batch_windows
        shards = self.windows.shards_of(first, count)
        manifests = " and ".join(share.manifest[:12] for share in self.job.mix.values())
        more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
        return ValueError(
            f"step {self.step:,} of run {self.job.run!r} diverged: summed loss {loss}, gradient norm {norm}{after}. "
            f"Its batch is windows {first:,} to {first + count - 1:,} of manifest {manifests}, "
            f"in {', '.join(shards[:3])}{more}. gpt2 dataset trace --step {self.step} shows the documents. Try a "
            f"smaller train.learning_rate, a longer warm-up or train.skip_outlier_steps in a new run."
        )

    def _log_and_save(self, metrics: StepMetrics, *, stopping: bool) -> None:
        """On the main rank: log the metrics, and save a checkpoint if one is due, now or since an earlier step."""
        metrics.memory_bytes = self.ddp.memory_bytes()
        started = time.perf_counter()
        self.log.add(metrics)
        logged = time.perf_counter()
        self._seconds["metrics_seconds"] = logged - started
        self.saver.check()  # if saves fail permanently, end now and not at the next save
        ending = stopping or self.is_finished
        # A run that ends early, at some validation after its best, would otherwise lose that model.
        is_best = self.config.patience_validations > 0 and metrics.val_loss == min(self.val_losses, default=inf)
        self._save_due |= ending or is_best or self._is_due(self.config.checkpoint_every_steps)
        if self._save_due:
            wait_seconds = inf if ending or is_best else max(metrics.step_seconds, SAVE_WAIT_SECONDS)
            recipe, cursor = self.job.recipe, cursor_of(self.job, self.step * self.config.batch_windows)
            record = CheckpointRecord(
                self.step, self.job.job_id, recipe["model"], recipe["train"], cursor, val_loss=metrics.val_loss
            )
            self._save_due = not self.saver.save(self.model, self.optimizer, record, wait_seconds=wait_seconds)
        if ending:
            self.saver.finish()
        self._seconds["checkpoint_seconds"] = time.perf_counter() - logged

    def _is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.config.max_steps

    def _on_stop_signal(self, signum: int, _frame: object) -> None:
        self._stop_requested = True
        if signum == signal.SIGINT:  # a second Ctrl-C ends at once
            signal.signal(signum, signal.default_int_handler)
