"""What a training costs beside its arithmetic, by the trainer's own clocks: waits for data, metrics, checkpoints.

    python tests/benchmarks/training/bench_trainer.py [--steps 200]

A small model (L2 H4 C128 T256, 1,024 tokens a step) makes the costs large beside a step; a checkpoint every 50 steps.
Limit: the three together at most 1 % of the wall time. The bare step is the same arithmetic on one batch, in a loop of
its own, without loader, metrics or checkpoints.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from model.__main__ import run_job
from model.checkpoints.records import read_metrics
from model.config import RunConfig
from model.data.loader import inputs_and_targets, widened
from model.gpt import GPT
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from model.training.optimizer import make_optimizer
from storage.datasets.manifest import Manifest
from storage.loading.windows import Windows
from storage.stores.opening import open_store
from tests.making import build_dataset, document, tiny_config, write_parquet

LIMIT = 0.01
COSTS = ("data_seconds", "metrics_seconds", "checkpoint_seconds")


def bare_seconds(config: RunConfig, manifest: Manifest, steps: int) -> list[float]:
    """Seconds of each bare step."""
    store = open_store(config.store_url)
    torch.manual_seed(config.train.seed)
    model = GPT(config.model).train()
    optimizer = make_optimizer(model, config.train)
    loader = Windows(
        store, config.data.dataset, manifest, "train", sequence_tokens=config.train.sequence_tokens, seed=1
    )
    cpu = torch.device("cpu")
    tokens_BT, targets_BT = inputs_and_targets(widened(loader.read(0, config.train.batch_windows), cpu), cpu)
    found = []
    for _ in range(steps):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        (model(tokens_BT, targets_BT) / config.train.batch_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        found.append(time.perf_counter() - started)
    return found


def main() -> None:
    """Train, then step barely, half before and half after; print the table."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--steps", type=int, default=200)
    steps = asked.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        write_parquet(Path(name) / "source.parquet", [document(number, 400) for number in range(2_000)])
        config = tiny_config(
            f"{name}/store", f"{name}/source.parquet", "data.shard_tokens=200_000", "model.layers=2", "model.heads=4",
            "model.width=128", "model.context_tokens=256", "train.sequence_tokens=256", "train.batch_tokens=1024",
            "train.micro_batch_sequences=4", f"train.max_steps={steps}", "train.checkpoint_every_steps=50",
            "train.validate_every_steps=0", "train.learning_rate=1e-3",
        )  # fmt: skip
        manifest = build_dataset(config)
        store = open_store(config.store_url)
        job = training_job(pin_run(store, config, manifest.digest, None))
        bare = bare_seconds(config, manifest, steps // 4)
        with contextlib.redirect_stdout(io.StringIO()):
            assert run_job(store.url, put_job(store, job)) == 0
        bare += bare_seconds(config, manifest, steps // 4)
        lines = [line.model_dump() for line in read_metrics(store, config.name)]
    assert len(lines) == steps
    # A line's metrics and checkpoint are those of the step before; the last one's are not in any.
    wall = sum(line["step_seconds"] + line["metrics_seconds"] + line["checkpoint_seconds"] for line in lines)
    print(f"{steps} steps of 1,024 tokens, {len(lines) // 50} checkpoints, {wall:.1f} s\n")
    print("| what | seconds | of the wall time |\n| --- | ---: | ---: |")
    for cost in COSTS:
        spent = sum(line[cost] for line in lines)
        print(f"| {cost.removesuffix('_seconds')} | {spent:.3f} | {spent / wall:.2%} |")
    spent = sum(line[cost] for line in lines for cost in COSTS)
    met = "yes" if spent <= LIMIT * wall else "NO"
    print(f"| together (limit {LIMIT:.0%}: {met}) | {spent:.3f} | {spent / wall:.2%} |")
    step = median(line["step_seconds"] for line in lines)
    print(f"\nA step of the trainer {step * 1e3:.0f} ms, a bare one {median(bare) * 1e3:.0f} ms: "
          f"{step / median(bare):.3f} times it (medians).")  # fmt: skip


if __name__ == "__main__":
    main()
