"""Assembles the trainer of a job: data, model, optimizer, checkpoint to resume from, log and saver. Trains nothing."""

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from model.checkpoints.records import CheckpointRecord, read_segments
from model.config import ModelConfig, ResourcesConfig, TrainingConfig
from model.data.loader import DataLoader
from model.evaluation.evaluator import Evaluator
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.runs.job import Job
from model.training.flops import flops_per_token, peak_flops
from model.training.metrics import MetricsLog
from model.training.optimizer import make_optimizer
from model.training.outliers import MEMORY_STEPS, Outliers
from model.training.resume import resume
from model.training.saver import Saver
from model.training.trainer import Trainer
from storage.datasets.manifest import Manifest, read_manifest
from storage.stores.store import Store


def build_trainer(store: Store, job: Job, ddp: DDPConfig) -> Trainer:
    """One rank's trainer, with the newest checkpoint loaded.

    Raises ValueError if the settings do not fit the dataset, CheckpointInvalid or ObjectMissing for a bad checkpoint.
    """
    config = TrainingConfig.model_validate(job.recipe["train"] | job.how.get("train", {}))
    resources = ResourcesConfig.model_validate(job.how.get("resources", {}))
    micro_batches = config.micro_batches(ddp.ranks)
    manifest = read_manifest(store, job.recipe["dataset"], job.recipe["manifest"])
    loader = _loader(store, job, config, resources, manifest, "train")
    _check_length(loader, job, config)
    torch.manual_seed(config.seed)  # every rank draws the same initial weights
    model = GPT(ModelConfig.model_validate(job.recipe["model"]), config.dropout).to(ddp.device)
    optimizer = make_optimizer(model, config)
    step, record = resume(store, job, model, optimizer)
    _check_same_on_all_ranks(ddp, job, record)
    evaluator = Evaluator(model, ddp, config.precision)
    compiled = config.compile == "on" or (config.compile == "auto" and ddp.device.type == "cuda")
    log = MetricsLog(
        store, job.run, config.max_steps, record.metrics if record else [],
        tensorboard=resources.tensorboard if ddp.is_main else "", step=step,
    )  # fmt: skip
    saver = Saver(
        store, job.run, log, unsaved_seconds=resources.unsaved_minutes * 60,
        keep_last=config.keep_last, keep_every_steps=config.keep_every_steps,
    )  # fmt: skip
    if ddp.is_main:
        mode = "compiled" if compiled else "eager"
        print(f"{job.job_id}: {evaluator.precision}, {mode}, from step {step:,}", flush=True)
    return Trainer(
        job=job,
        config=config,
        ddp=ddp,
        model=model,
        parallel=_parallel(model, compiled, ddp),
        optimizer=optimizer,
        micro_batches=micro_batches,
        loader=loader,
        val_loader=_loader(store, job, config, resources, manifest, "val") if config.validate_every_steps else None,
        prefetch_batches=resources.prefetch_batches,
        evaluator=evaluator,
        outliers=_outliers(store, config, record),
        log=log,
        saver=saver,
        step=step,
        mfu_per_speed=_mfu_per_speed(model, config, ddp) if evaluator.precision == "bf16" else None,
    )


def _loader(
    store: Store, job: Job, config: TrainingConfig, resources: ResourcesConfig, manifest: Manifest, split: str
) -> DataLoader:
    return DataLoader(
        store, job.recipe["dataset"], manifest, split, sequence_tokens=config.sequence_tokens, seed=config.seed,
        cache_bytes=resources.cache_bytes,
    )  # fmt: skip


def _check_length(loader: DataLoader, job: Job, config: TrainingConfig) -> None:
    windows = loader.order.epoch_windows
    if windows < config.batch_windows:
        raise ValueError(
            f"train.batch_tokens = {config.batch_tokens:,}: the train split of dataset {job.recipe['dataset']!r} has "
            f"{windows:,} windows of {config.sequence_tokens:,} tokens, less than one batch. Use at most "
            f"train.batch_tokens = {windows * config.sequence_tokens:,}, fewer data.val_shards, or more text."
        )


def _check_same_on_all_ranks(ddp: DDPConfig, job: Job, record: CheckpointRecord | None) -> None:
    """Raise ValueError if the ranks have loaded different checkpoints: another process has saved meanwhile."""
    if not ddp.agree(int(record.attempt, 16) if record else 0):
        loaded = f"step {record.step:,}" if record else "none"
        raise ValueError(
            f"run {job.run!r}: the ranks loaded different checkpoints (rank {ddp.rank}: {loaded}), because another "
            f"process is still saving. When it has ended, run the same command again."
        )


def _parallel(model: GPT, compiled: bool, ddp: DDPConfig) -> torch.nn.Module:
    """The model, compiled if `compiled`, synchronised if there are several ranks."""
    module: Any = torch.compile(model) if compiled else model
    return DistributedDataParallel(module, forward_sync_buffers=False) if ddp.ranks > 1 else module


def _outliers(store: Store, config: TrainingConfig, record: CheckpointRecord | None) -> Outliers:
    """The outliers as the earlier steps left them. Reads those only if steps may be skipped."""
    lines = read_segments(store, record.metrics) if record and config.skip_outlier_steps else []
    norms = [line["gradient_norm"] for line in lines if not line.get("skipped")]
    return Outliers(config.skip_outlier_steps, norms[-MEMORY_STEPS:], len(lines) - len(norms))


def _mfu_per_speed(model: GPT, config: TrainingConfig, ddp: DDPConfig) -> float | None:
    """MFU for each token per second, or None if the GPU's peak is unknown."""
    peak = peak_flops(ddp.device_name)
    flops = flops_per_token(model.config, model.parameter_count, config.sequence_tokens)
    return flops / (peak * ddp.ranks) if peak else None
