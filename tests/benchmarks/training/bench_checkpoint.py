"""How long the training stands still for a checkpoint of GPT-2 124M, and how fast it is stored: 1.5 GB.

    python tests/benchmarks/training/bench_checkpoint.py [--rounds 3] [--server seaweedfs]

Beside torch.save, which the training waits for, and torch's own asynchronous `distributed.checkpoint`; all into
folders of one disk, ours into an S3 server, too. Nothing is trained: the optimizer's state is made up.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from model.checkpoints.records import CheckpointRecord, StepMetrics, checkpoints
from model.config import ModelConfig, TrainingConfig
from model.gpt import GPT
from model.training.flops import parameter_count
from model.training.metrics import MetricsLog
from model.training.optimizer import make_optimizer
from model.training.saver import Saver
from storage.stores.opening import open_store
from tests import servers


class Found(NamedTuple):
    """Seconds for which the training stands still, and until all is stored."""

    still: float
    stored: float


def made() -> tuple[GPT, torch.optim.Optimizer]:
    """The model, and an optimizer as it is after a step."""
    model = GPT(ModelConfig())
    optimizer = make_optimizer(model, TrainingConfig())
    for weight in model.parameters():
        optimizer.state[weight] = {
            "step": torch.tensor(1.0), "exp_avg": torch.rand_like(weight), "exp_avg_sq": torch.rand_like(weight)
        }  # fmt: skip
    return model, optimizer


def ours(url: str, model: GPT, optimizer: torch.optim.Optimizer) -> Callable[[], Found]:
    """A saver, and what one save of it takes."""
    store = open_store(url, create=True)
    config = TrainingConfig(keep_last=1, keep_every_steps=0)
    log = MetricsLog(store, "bench", 1, [])
    saver = Saver(store, "bench", log, config, unsaved_minutes=1.0)
    step = 0

    def save() -> Found:
        nonlocal step
        step += 1
        log.add(StepMetrics(step=step, loss=0.0, learning_rate=0.0, gradient_norm=0.0))
        record = CheckpointRecord(step, "bench", {}, {})
        started = time.perf_counter()
        assert saver.save(model, optimizer, record, wait_seconds=0)
        still = time.perf_counter() - started
        saver.finish()
        found = Found(still, time.perf_counter() - started)
        assert [record.step for record in checkpoints(store, "bench")] == [step]
        return found

    return save


def torch_save(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> Callable[[], Found]:
    """What most trainers do: torch.save of both, waited for."""
    folder.mkdir()

    def save() -> Found:
        started = time.perf_counter()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
        with (folder / "checkpoint.pt").open("rb") as file:
            os.fsync(file.fileno())  # as ours and every store does
        return Found(time.perf_counter() - started, time.perf_counter() - started)

    return save


def torch_async(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> Callable[[], Found]:
    """torch.distributed.checkpoint.async_save: a copy, then files written by a thread."""
    count = 0

    def save() -> Found:
        nonlocal count
        count += 1
        state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        shutil.rmtree(folder / str(count - 1), ignore_errors=True)
        started = time.perf_counter()
        saving = dcp.async_save(state, checkpoint_id=folder / str(count))
        still = time.perf_counter() - started
        saving.result()  # type: ignore[union-attr]
        return Found(still, time.perf_counter() - started)

    return save


def main() -> None:
    """Measure in rounds, one contender after the other; print the table."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--server", choices=["seaweedfs", "minio"], default="seaweedfs")
    words = asked.parse_args()
    logging.disable(logging.WARNING)
    model, optimizer = made()
    size = 3 * 4 * parameter_count(model.config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        server = servers.start(words.server, folder / "server")
        os.environ |= server.environment
        try:
            contenders = {
                "ours, folder": ours(str(folder / "ours"), model, optimizer),
                f"ours, {words.server}": ours(f"s3://{servers.BUCKET}/bench", model, optimizer),
                "torch.save": torch_save(folder / "torch", model, optimizer),
                "torch distributed.checkpoint, async": torch_async(folder / "async", model, optimizer),
            }
            found: dict[str, list[Found]] = {one: [] for one in contenders}
            for number in range(words.rounds + 1):
                for one, save in contenders.items():
                    found[one].append(save())
                    print(f"round {number}: {one}: {found[one][-1]}", file=sys.stderr, flush=True)
        finally:
            server.stop()
            dist.destroy_process_group()
    print(f"124M parameters, {size / 1e6:,.0f} MB; median of {words.rounds} rounds after a first one\n")
    print("| contender | stands still s | first time s | stored after s | MB/s |\n| --- | ---: | ---: | ---: | ---: |")
    for one, (first, *later) in found.items():
        still, stored = median(each.still for each in later), median(each.stored for each in later)
        print(f"| {one} | {still:.2f} | {first.still:.2f} | {stored:.2f} | {size / stored / 1e6:,.0f} |")


if __name__ == "__main__":
    main()
