"""The automatic micro-batch against a grid of all sizes, on this device.

    python tests/benchmarks/training/bench_micro_batch.py [--rounds 5] [--busy]

The grid trains whole steps of 4,096 tokens with each size in turn, round after round, so that all sizes meet the same
load; medians. Limits: the chosen size is within 3 % of the best of the grid, and was found in 30 s. On a busy host the
clock measures the other load; `--busy` uses one thread and its processor time, in the choice too.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from model.config import ModelConfig, TrainingConfig
from model.evaluation.evaluator import Evaluator
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.tokenizer import VOCABULARY
from model.training.micro_batch import MEASURE_SECONDS, choose_sequences
from model.training.optimizer import make_optimizer
from storage.stores.opening import open_store

LIMIT = 0.03
BATCH_TOKENS = 4_096
SHAPES = {"L4 C64 T128, as the demo": (4, 64, 128), "L4 C256 T256": (4, 256, 256)}


def chosen_size(evaluator: Evaluator, config: TrainingConfig) -> tuple[int, float]:
    """The automatic size of a long run, and the seconds that it took to find."""
    ours = {"batch_tokens": BATCH_TOKENS, "sequence_tokens": config.sequence_tokens, "ranks": 1}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        size = choose_sequences(open_store(folder, create=True), evaluator, config, ours)
        return size, time.perf_counter() - started


def grid(evaluator: Evaluator, config: TrainingConfig, rounds: int) -> dict[int, float]:
    """Tokens per second of whole steps by size: the median of the rounds."""
    optimizer = make_optimizer(evaluator.model, config)
    tokens_BT = torch.randint(VOCABULARY, (config.batch_windows, config.sequence_tokens + 1))
    tokens_BT = tokens_BT.to(evaluator.ddp.device)
    sizes = [1 << power for power in range(config.batch_windows.bit_length())]
    speeds: dict[int, list[float]] = {size: [] for size in sizes}
    evaluator.model.train()
    for _ in range(rounds + 1):  # the first warms up
        for size in sizes:
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            for part_BT in tokens_BT.split(size):
                with evaluator.autocast():
                    loss = evaluator.model(part_BT[:, :-1], part_BT[:, 1:])
                (loss / BATCH_TOKENS).backward()
            torch.nn.utils.clip_grad_norm_(evaluator.model.parameters(), config.clip).item()
            optimizer.step()
            speeds[size].append(BATCH_TOKENS / (time.perf_counter() - started))
    return {size: median(measured[1:]) for size, measured in speeds.items()}


def main() -> None:
    """Choose and measure for each shape; print the table."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--busy", action="store_true")
    rounds, busy = vars(asked.parse_args()).values()
    clock = " by processor time of one thread" if busy else ""
    if busy:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time
    ddp = DDPConfig.detect({})
    print(f"{ddp.device_name}, torch {torch.__version__}, {rounds} rounds{clock}, load {os.getloadavg()[0]:.1f}\n")
    print("| shape | tokens/s by sequences | best | chosen | found in | below the best |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, (layers, width, tokens) in SHAPES.items():
        model = GPT(ModelConfig(layers=layers, heads=4, width=width, context_tokens=tokens)).to(ddp.device)
        config = TrainingConfig(sequence_tokens=tokens, batch_tokens=BATCH_TOKENS, max_steps=10**9)
        evaluator = Evaluator(model, ddp)
        size, seconds = chosen_size(evaluator, config)
        speeds = grid(evaluator, config, rounds)
        best = max(speeds, key=lambda size: speeds[size])
        below = 1 - speeds[size] / speeds[best]
        met = "yes" if below <= LIMIT and seconds <= MEASURE_SECONDS else "NO"
        cells = ", ".join(f"{size}: {speed:,.0f}" for size, speed in speeds.items())
        print(
            f"| {name} | {cells} | {best} | {size} | {seconds:.1f} s | {below:.1%} (limit {LIMIT:.0%}: {met}) |",
            flush=True,
        )
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
