"""The training loop: steps, validation, checkpoints, and going on exactly where a killed one stood.

    batch of step k ─▶ forward, backward in micro-batches ─▶ clip ─▶ AdamW ─▶ metrics ─▶ checkpoint now and then

Knows no Prefect, no command line and no environment.
"""

import signal
import time
from contextlib import nullcontext
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import load_optimizer, load_weights, retain, save_checkpoint
from model.config import ModelConfig, TrainingConfig
from model.distributed import DDPConfig
from model.evaluation import Evaluator
from model.gpt import GPT
from model.history import CheckpointRecord, checkpoints
from model.job import Job
from model.loader import DataLoader, inputs_and_targets
from model.metrics import MetricsLog
from model.optimizer import learning_rate, make_optimizer
from storage.errors import CheckpointInvalid
from storage.manifest import read_manifest
from storage.store import Store


class Trainer:
    """One rank of one training. `fit` brings the run to its last step, from wherever it is."""

    def __init__(self, store: Store, job: Job, ddp: DDPConfig) -> None:
        self.store, self.job, self.ddp = store, job, ddp
        self.config = TrainingConfig.model_validate(job.recipe["train"])
        self.micro_batches = self.config.micro_batches(ddp.ranks)
        manifest = read_manifest(store, job.recipe["dataset"], job.recipe["manifest"])
        self.loader = self._loader(manifest, "train")
        torch.manual_seed(self.config.seed)  # every rank draws the same initial weights
        self.model = GPT(ModelConfig.model_validate(job.recipe["model"]), self.config.dropout).to(ddp.device)
        self.optimizer = make_optimizer(self.model, self.config)
        resumed = self._resume()
        self.step = resumed.step if resumed else 0
        self.evaluator = Evaluator(self.model, ddp, self.config.precision)
        self.val_loader = self._loader(manifest, "val") if self.config.validate_every_steps else None
        self.parallel = self._parallel()
        self.log = MetricsLog(store, job.run, self.config.max_steps, resumed.metrics if resumed else [])
        self._stop_asked = False

    def fit(self) -> dict[str, Any] | None:
        """Train up to the last step. Returns the result, or None when a SIGTERM stopped it at a checkpoint."""
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            while self.step < self.config.max_steps:
                line, stopping = self._train_step()
                if self.val_loader and self._due(self.config.validate_every_steps):
                    line["val_loss"] = self.evaluator.val_loss(self.val_loader, self.config.validation_tokens)["loss"]
                if self.ddp.is_main:
                    self.log.add(line)
                if stopping or self._due(self.config.checkpoint_every_steps):
                    self._save()
                if stopping and self.step < self.config.max_steps:
                    return None
            return {"step": self.step, "tokens": self.step * self.config.batch_tokens}
        finally:
            signal.signal(signal.SIGTERM, before)

    def _train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer update. Returns its numbers and whether any rank was asked to stop."""
        started = time.monotonic()
        torch.manual_seed(self._step_seed())
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = self.config.batch_windows // self.ddp.ranks
        windows = self.loader.windows(self.step * self.config.batch_windows + self.ddp.rank * share, share)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64)
        size = self.config.micro_batch_sequences
        for index in range(self.micro_batches):
            tokens_BT, targets_BT = inputs_and_targets(windows[index * size : (index + 1) * size], self.ddp.device)
            last = index == self.micro_batches - 1
            with self._no_sync() if not last else nullcontext(), self.evaluator.autocast():
                loss = self.parallel(tokens_BT, targets_BT)
                # DDP averages over ranks: with this scale the gradient is that of the mean over the whole batch
                (loss * (self.ddp.ranks / self.config.batch_tokens)).backward()
            sums[0] += loss.detach().cpu().double()  # MPS has no float64
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        sums[1] = float(self._stop_asked)
        total, stop = self.ddp.sum(sums.to(self.ddp.device) if self.ddp.device.type == "cuda" else sums).tolist()
        self._check_finite(total, float(norm))
        self.optimizer.step()
        line = {
            "step": self.step,
            "loss": total / self.config.batch_tokens,
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "tokens_per_second": self.config.batch_tokens / (time.monotonic() - started),
        }
        self.step += 1
        return line, stop > 0

    def _step_seed(self) -> int:
        """What this rank draws in this step (dropout) depends on nothing else, so a resume needs no generator state."""
        words = np.random.SeedSequence([self.config.seed, self.step, self.ddp.rank]).generate_state(2)
        return int(words[0]) << 31 | int(words[1]) >> 1

    def _check_finite(self, loss: float, norm: float) -> None:
        if not (abs(loss) < float("inf") and norm < float("inf")):
            raise ValueError(
                f"step {self.step:,} of run {self.job.run!r}: a finite loss and gradient were expected, found a summed "
                f"loss of {loss} and a gradient norm of {norm}. Try a smaller train.learning_rate or a longer warm-up "
                f"in a new run."
            )

    def _save(self) -> None:
        """Save from the main rank; the others wait for it at the next step's sum."""
        if not self.ddp.is_main:
            return
        next_window = self.step * self.config.batch_windows
        save_checkpoint(
            self.store,
            self.job.run,
            step=self.step,
            job=self.job.job_id,
            cursor=self._cursor() | {"next_window": next_window},
            train=self.job.recipe["train"],
            model=self.model,
            optimizer=self.optimizer,
            metrics=self.log.put_segment(),
        )
        retain(self.store, self.job.run, self.config.keep_last, self.config.keep_every_steps)

    def _resume(self) -> CheckpointRecord | None:
        """Load the newest checkpoint. Raises CheckpointInvalid when it is of another model, schedule or dataset."""
        kept = checkpoints(self.store, self.job.run)
        if not kept:
            return None
        record = kept[-1]
        found = {"model": record.model, "train": record.train} | {name: record.cursor[name] for name in self._cursor()}
        asked = {"model": self.model.config.model_dump(mode="json"), "train": self.job.recipe["train"]} | self._cursor()
        if differing := [name for name in asked if asked[name] != found[name]]:
            raise CheckpointInvalid(
                f"run {self.job.run!r}: the checkpoint of step {record.step:,} belongs to another "
                f"{', '.join(differing)}: it has "
                f"{'; '.join(f'{name} {_shown(found[name])}, asked for {_shown(asked[name])}' for name in differing)}. "
                f"Choose another name with --set name=…, or delete the run's checkpoints."
            )
        load_weights(self.store, self.job.run, record, self.model)
        load_optimizer(self.store, self.job.run, record, self.model, self.optimizer)
        return record

    def _cursor(self) -> dict[str, Any]:
        recipe = self.job.recipe
        return {"dataset": recipe["dataset"], "manifest": recipe["manifest"], "seed": self.config.seed}

    def _loader(self, manifest: Any, split: str) -> DataLoader:
        shape = {"sequence_tokens": self.config.sequence_tokens, "seed": self.config.seed}
        return DataLoader(self.store, self.job.recipe["dataset"], manifest, split, **shape)

    def _parallel(self) -> torch.nn.Module:
        """The model, compiled where that is asked for, and synchronised where there are several ranks."""
        model: Any = self.model
        wanted = self.config.compile
        if wanted == "on" or (wanted == "auto" and self.ddp.device.type == "cuda"):
            model = torch.compile(model)
        return DistributedDataParallel(model) if self.ddp.ranks > 1 else model

    def _no_sync(self) -> Any:
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def _due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.config.max_steps

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        self._stop_asked = True


def _shown(value: Any) -> str:
    return str(value) if len(str(value)) < 200 else f"{str(value)[:200]}…"
