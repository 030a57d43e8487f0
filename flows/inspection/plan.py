"""What a run will take, before it starts: tokens, bytes, memory, hours, money. Asks the store, the source, the GPUs."""

import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from flows.inspection.status import run_names
from model.checkpoints.records import checkpoints, read_segments
from model.config import RunConfig
from model.runs.job import read_result
from model.runs.run import find_run, training_job
from model.tokenizer import VOCABULARY
from model.training.flops import flops_per_token, parameter_count, peak_flops
from storage.datasets.manifest import Manifest, latest_manifest, read_manifest
from storage.errors import ObjectMissing, StorageError
from storage.loading.mix import parse_mix
from storage.sources.files import find_files, is_on_hub
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from storage.stores.store import Store

USUAL_MFU = 0.4  # one H100 trained GPT-2 124M with 41 %, as others measured with this shape
MOVED_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments, in fp32
# Per token of a micro-batch, fitted to an H100 (124M, bf16, compiled): 3.8 GiB for 8 x 512, 15.6 GiB for 32 x 1,024.
BLOCK_BYTES, LOGIT_BYTES = 14, 6  # for each layer and channel; for each entry of the vocabulary
MICRO_BATCH_TOKENS = 32_768  # of an automatic micro-batch
CHECKPOINT_BYTES = 12  # per parameter: weight and AdamW's two moments
PARQUET_TOKENS, TEXT_TOKENS = 0.35, 0.23  # per byte of FineWeb-Edu's parquet files, and of English text
FORWARD = 1 / 3  # the cost of a validated token, in trained tokens


@dataclass(frozen=True)
class Plan:
    """What a run takes. None: not known yet."""

    steps: int
    tokens: int
    gpus: int  # or processes on a CPU
    epochs: float | None  # of the run's own dataset
    source_bytes: int | None
    shard_bytes: int | None
    checkpoint_bytes: int
    gpu_memory_bytes: int | None
    tokens_per_second: float | None
    basis: str  # of tokens_per_second
    hours: float | None
    price: float | None

    def lines(self) -> dict[str, str]:
        """The plan for people, by what it is about."""
        epochs = f", {self.epochs:.2f} epochs" if self.epochs else ""
        sizes = {"source": self.source_bytes, "shards": self.shard_bytes, "checkpoints": self.checkpoint_bytes}
        hours = self.hours and (f"{self.hours:,.1f} hours" if self.hours >= 1 else f"{60 * self.hours:,.1f} minutes")
        lines = {
            "training": f"{self.steps:,} steps, {self.tokens:,} tokens{epochs}",
            "storage": ", ".join(f"{decimal(size)} of {name}" for name, size in sizes.items() if size is not None),
            "speed": f"{self.tokens_per_second:,.0f} tokens/s, {self.basis}" if self.tokens_per_second else self.basis,
            "GPU memory": self.gpu_memory_bytes and f"{self.gpu_memory_bytes / 2**30:,.1f} GiB on each, estimated",
            "time": hours or "unknown",
            "price": f"{self.price:,.2f}" if self.price else "set resources.price_per_gpu_hour",
        }
        return {label: text for label, text in lines.items() if text}


def plan(config: RunConfig, measure: Callable[[RunConfig, int], float] | None = None) -> Plan:
    """The plan of a run on this host. `measure` returns its tokens per second on so many GPUs. Creates no store."""
    model, train, resources = config.model, config.train, config.resources
    store: Store | None = None
    with suppress(ObjectMissing):
        store = open_store(config.store_url)
    tokens, parameters, mix = train.max_steps * train.batch_tokens, parameter_count(model), parse_mix(train.mix)
    own_tokens = tokens * mix[config.data.dataset] / sum(mix.values()) if mix else tokens
    manifest = None if store is None else _manifest(store, config)
    names = [] if resources.device == "cpu" else gpu_names()
    gpus = (resources.processes or len(names) or 1) * resources.nodes
    rate, basis = measure(config, gpus) if measure else None, "measured now"
    if rate is None and store is not None:
        rate, basis = _rate_of_runs(store, config, gpus)
    if rate is None and names and (peak := peak_flops(names[0])):
        rate = USUAL_MFU * peak * gpus / flops_per_token(model, train.sequence_tokens)
        basis = f"expected of {gpus} x {names[0]} at {USUAL_MFU:.0%} of its peak"
    known = (sum(manifest.source_files["size_bytes"]), manifest.tokens) if manifest else _source(store, config)
    source_bytes, dataset_tokens = known
    train_tokens = manifest.totals["train"]["tokens"] if manifest else dataset_tokens
    val_tokens = min(train.validation_tokens, manifest.totals["val"]["tokens"] if manifest else train.validation_tokens)
    validations = train.max_steps // train.validate_every_steps if train.validate_every_steps else 0
    hours = None if rate is None else (tokens + FORWARD * validations * val_tokens * (len(mix) or 1)) / rate / 3600
    kept = train.keep_last + 1 + (train.max_steps // train.keep_every_steps if train.keep_every_steps else 0)
    per_token = BLOCK_BYTES * model.layers * model.width + LOGIT_BYTES * VOCABULARY
    micro_batch_tokens = (train.micro_batch_sequences * train.sequence_tokens) or MICRO_BATCH_TOKENS
    gpu_memory_bytes = MOVED_BYTES * parameters + per_token * micro_batch_tokens
    return Plan(
        steps=train.max_steps,
        tokens=tokens,
        gpus=gpus,
        epochs=own_tokens / train_tokens if train_tokens else None,
        source_bytes=source_bytes,
        shard_bytes=dataset_tokens and 2 * dataset_tokens,
        checkpoint_bytes=kept * CHECKPOINT_BYTES * parameters,
        gpu_memory_bytes=None if resources.device == "cpu" else gpu_memory_bytes,
        tokens_per_second=rate,
        basis=basis if rate else "unknown before step 20; gpt2 plan --measure",
        hours=hours,
        price=hours * gpus * resources.price_per_gpu_hour if hours and resources.price_per_gpu_hour else None,
    )


def gpu_names() -> list[str]:
    """The names of this host's NVIDIA GPUs."""
    with suppress(OSError, subprocess.SubprocessError):
        argv = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True)
        return listed.stdout.split("\n")[:-1]
    return []


def _manifest(store: Store, config: RunConfig) -> Manifest | None:
    run = find_run(store, config.name)
    return read_manifest(store, run.dataset, run.manifest) if run else latest_manifest(store, config.data.dataset)


def _source(store: Store | None, config: RunConfig) -> tuple[int | None, int | None]:
    """Bytes of the source, and about how many tokens it holds; None: not known before the build."""
    data = config.data
    with suppress(StorageError, ValueError, OSError):
        if is_on_hub(data.source):
            if store is None:
                return None, None
            files = list_source(store, data.source, data.config, data.revision, "train", filters=data.filters)[0].files
            sizes = {file.name: file.size_bytes for file in files}
        else:
            sizes = {str(place): Path(place).stat().st_size for place in find_files(data.source, "data.source")[0]}
        size_bytes = sum(sizes.values())
        tokens = int(size_bytes * (PARQUET_TOKENS if all(".parquet" in name for name in sizes) else TEXT_TOKENS))
        return size_bytes, min(tokens, data.max_tokens or tokens)
    return None, None


def _rate_of_runs(store: Store, config: RunConfig, gpus: int) -> tuple[float | None, str]:
    """Tokens per second of a run of this store with the same model, sequences and processes, best its own."""
    for name in sorted(run_names(store), key=lambda name: name != config.name):
        with suppress(StorageError, ValueError):
            run = find_run(store, name)
            if run is None or run.config["model"] != config.model.model_dump():
                continue
            result = read_result(store, training_job(run))  # without a result, the processes are not known
            if result and result["environment"].get("ranks", gpus) != gpus:
                continue
            trained, ours = RunConfig.model_validate(run.config, extra="ignore").train, config.train
            if (trained.sequence_tokens, trained.batch_tokens) == (ours.sequence_tokens, ours.batch_tokens):
                segments = [key for record in checkpoints(store, name)[-1:] for key in record.metrics[-2:]]
                lines = read_segments(store, segments)[-200:]
                seconds = sum(line.step_seconds + line.metrics_seconds + line.checkpoint_seconds for line in lines)
                if seconds:
                    return len(lines) * config.train.batch_tokens / seconds, f"as run {name} trained"
    return None, ""
