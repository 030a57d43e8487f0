"""The run of GPT-2 124M on this host's GPUs: speed, MFU, memory, waits; killed and gone on with; its loss on real text.

    python tests/benchmarks/training/bench_gpu.py FOLDER [--steps 100] [--text FILES] [--set SECTION.NAME=VALUE …]

On made-up documents one run is asked to stop (SIGTERM) after `--steps` of the schedule's 19,073; another one is killed
at a quarter of them, goes on from its checkpoint to a half, and its losses are compared with the first one's. With
--text a run of 200 steps of 65,536 tokens learns those parquet files. Prints tables. FOLDER keeps the datasets.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from model.checkpoints.records import checkpoints, read_metrics
from model.config import RunConfig
from model.config_file import load_config
from model.runs.job import Job, put_job
from model.runs.run import pin_run, training_job
from storage.datasets.manifest import Manifest, latest_manifest
from storage.stores.opening import open_store
from tests.making import build_dataset, document, write_parquet

PRESET = Path(__file__).parents[3] / "model" / "presets" / "gpt2-124m.toml"
UNTIMED_STEPS = 5  # compilation and the first looks at the GPU's memory
MADE_UP, DOCUMENTS, WORDS = "made-up", 60_000, 400  # 24M tokens


def dataset(config: RunConfig) -> Manifest:
    """The dataset's newest version, made if there is none, as is its made-up source."""
    if found := latest_manifest(open_store(config.store_url, create=True), config.data.dataset):
        return found
    if config.data.dataset == MADE_UP:
        write_parquet(Path(config.data.source), [document(number, WORDS) for number in range(DOCUMENTS)], counted=False)
    return build_dataset(config)


def configured(folder: Path, source: str, name: str, *settings: str) -> RunConfig:
    """The preset with a dataset of this host."""
    return load_config(PRESET, [f"store_url={folder / 'store'}", f"data.source={source}", f"name={name}", *settings])


def lines_of(process: subprocess.Popen[str]) -> Iterator[tuple[int, str]]:
    """What the training says, with the steps done so far."""
    assert process.stdout is not None
    step = 0
    for line in process.stdout:
        if line.startswith("step "):
            step = int(line.removeprefix("step ").partition("/")[0].replace(",", ""))
        yield step, line.rstrip()


def train(config: RunConfig, job: Job, *, until: int = 0, how: int = signal.SIGTERM) -> tuple[int, list[float]]:
    """Train until that step, then send the signal. Returns the exit code and when each step was said, in seconds."""
    started = time.monotonic()
    store = open_store(config.store_url)
    words = [sys.executable, "-m", "model", config.store_url, put_job(store, job)]
    seen: list[float] = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PRESET.parents[2],
                          start_new_session=True) as process:  # fmt: skip
        for step, line in lines_of(process):
            if line.startswith("step "):
                seen.append(time.monotonic() - started)
            if not line.startswith("step ") or step % 10 == 0 or len(seen) < 3:
                print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)
            if until and step >= until:
                os.killpg(process.pid, how)
                until = 0
    return process.returncode, seen


def table(lines: list[dict[str, Any]]) -> None:
    """The numbers of the steps after the first few."""
    timed = lines[UNTIMED_STEPS:]
    wall = sum(line["step_seconds"] + line["metrics_seconds"] + line["checkpoint_seconds"] for line in timed)
    print(f"\n| what | of steps {UNTIMED_STEPS + 1} to {len(lines)} |\n| --- | ---: |")
    print(f"| tokens/s, median | {median(line['tokens_per_second'] for line in timed):,.0f} |")
    if "mfu" in timed[0]:
        print(f"| MFU, median | {median(line['mfu'] for line in timed):.1%} |")
    print(f"| seconds a step, median | {median(line['step_seconds'] for line in timed):.3f} |")
    print(f"| peak memory, GiB | {max(line['memory_bytes'] for line in timed) / 2**30:.1f} |")
    for cost in ("data", "metrics", "checkpoint"):
        print(f"| {cost}, of the wall time | {sum(line[f'{cost}_seconds'] for line in timed) / wall:.3%} |")
    print(f"| loss, first to last | {lines[0]['loss']:.4f} to {lines[-1]['loss']:.4f} |\n", flush=True)


def apart(one: list[dict[str, Any]], other: list[dict[str, Any]], name: str) -> float:
    """The largest relative difference of a number over the steps that both have."""
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(one, other, strict=False))


def made_up(folder: Path, steps: int, settings: list[str]) -> None:
    """The undisturbed run and the killed one."""
    source = folder / "made-up.parquet"
    every = max(steps // 5, 1)
    words = [f"data.dataset={MADE_UP}", "data.val_shards=1", "train.validate_every_steps=0",
             f"train.checkpoint_every_steps={every}", *settings]  # fmt: skip
    whole, killed = (configured(folder, str(source), name, *words) for name in ("whole", "killed"))
    store, manifest = open_store(str(folder / "store"), create=True), dataset(whole)
    code, seconds = train(whole, training_job(pin_run(store, whole, manifest.digest, None)), until=steps)
    lines = [line.model_dump() for line in read_metrics(store, "whole")]
    print(f"SIGTERM at step {steps}: exit code {code}, first step after {seconds[0]:.1f} s, saved at step {len(lines)}")
    table(lines)
    job = training_job(pin_run(store, killed, manifest.digest, None))
    print("killed:", train(killed, job, until=every + max(steps // 20, 1), how=signal.SIGKILL)[0])
    print(
        "gone on from step", checkpoints(store, "killed")[-1].step, "exit code", train(killed, job, until=2 * every)[0]
    )
    again = [line.model_dump() for line in read_metrics(store, "killed")]
    print(f"the first {min(len(again), len(lines))} losses apart: {apart(lines, again, 'loss'):.1e} relative, gradient "
          f"norms {apart(lines, again, 'gradient_norm'):.1e}")  # fmt: skip


def real_text(folder: Path, files: str, settings: list[str]) -> None:
    """A loss curve."""
    config = configured(
        folder, files, "text", "data.dataset=text", "data.shard_tokens=500_000", "data.val_shards=1",
        "train.batch_tokens=65_536", "train.max_steps=200", "train.warmup_steps=20", "train.validate_every_steps=20",
        *settings,
    )  # fmt: skip
    store, manifest = open_store(config.store_url, create=True), dataset(config)
    print("real text: exit code", train(config, training_job(pin_run(store, config, manifest.digest, None)))[0])
    lines = [line.model_dump() for line in read_metrics(store, "text")]
    print("\n| step | loss | validation loss |\n| ---: | ---: | ---: |")
    for line in lines[:1] + lines[19::20]:
        print(f"| {line['step'] + 1} | {line['loss']:.3f} | {line.get('val_loss', float('nan')):.3f} |")
    table(lines)


def main() -> None:
    """Run what is asked for."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("folder", type=Path)
    asked.add_argument("--steps", type=int, default=100)
    asked.add_argument("--text", help="parquet files to learn: a file, a folder or a glob")
    asked.add_argument("--set", action="append", default=[], help="a setting of all runs: SECTION.NAME=VALUE")
    words = asked.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"torch {torch.__version__}, {', '.join(gpus) or 'no GPU'}; {' '.join(words.set)}")
    if words.steps:
        made_up(words.folder, words.steps, words.set)
    if words.text:
        real_text(words.folder, words.text, words.set)


if __name__ == "__main__":
    main()
