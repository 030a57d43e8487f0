"""Chooses the size of the micro-batches: fixed for a short run, the fastest that fits for a long one.

The size changes no batch. A long run measures once per store, device and model; later runs find what it stored.
"""

import time
from math import inf

import torch

from model.config import TrainingConfig
from model.evaluation.evaluator import Evaluator
from model.processes.distributed import DDPConfig
from model.runs.speed import Speed, put_speed, read_speed
from model.tokenizer import VOCABULARY
from model.training.flops import flops_per_token, peak_flops
from storage.stores.store import Store

FIXED_TOKENS = {"cpu": 1_024, "mps": 1_024, "cuda": 32_768}  # four times as many must fit, except on CUDA
REPETITIONS = 3
MEASURE_SECONDS = 30.0
PEAK_FLOPS = {"cpu": 2.5e11, "mps": 5e12, "cuda": 1e14}  # if the device's own is unknown; the CPU has two cores
USUAL_MFU = 0.4  # that of an H100 with the 124M model


def choose_sequences(store: Store, evaluator: Evaluator, config: TrainingConfig, setup: dict[str, object]) -> int:
    """Sequences per micro-batch, the same on all ranks. Leaves the weights unchanged. Raises ObjectCorrupt."""
    ddp, model, windows = evaluator.ddp, evaluator.model, config.batch_windows // evaluator.ddp.ranks
    largest = windows & -windows  # the largest power of two that divides them
    fixed = min(1 << max(FIXED_TOKENS[ddp.device.type] // config.sequence_tokens, 1).bit_length() - 1, largest)
    flops = flops_per_token(model.config, model.parameter_count, config.sequence_tokens) * config.batch_tokens
    peak = (peak_flops(ddp.device_name) or PEAK_FLOPS[ddp.device.type]) * ddp.ranks
    is_short = flops * config.max_steps < 100 * MEASURE_SECONDS * USUAL_MFU * peak  # measuring could take over 1 %
    stored = read_speed(store, setup) if ddp.is_main else None
    sequences = int(_sum(ddp, stored.sequences if stored and not (is_short and stored.timings) else 0))
    if is_short:
        return min(fixed, sequences or fixed)
    if not sequences:
        sizes = [1 << power for power in range(min(largest, 4 * fixed).bit_length())]
        timings = _measure(evaluator, config.sequence_tokens, sizes)
        torch.accelerator.reset_peak_memory_stats()  # or the metrics would show the peak of measuring
        fastest = min(timings, key=lambda size: timings[size][0] / size, default=1)
        seconds, _ = timings.get(fastest, (inf, 0))  # if no size fits, the first step raises the error
        speed = Speed(setup, fastest, ddp.ranks * fastest * config.sequence_tokens / seconds, timings)
        sequences = int(_sum(ddp, put_speed(store, speed).sequences if ddp.is_main else 0))
    return sequences


def _measure(evaluator: Evaluator, sequence_tokens: int, sizes: list[int]) -> dict[int, tuple[float, int]]:
    """The shortest seconds by size, and the peak memory of the sizes up to it. Ends in time, on all ranks alike."""
    ddp, model = evaluator.ddp, evaluator.model.train()
    _spare = torch.empty(3 * model.parameter_count, device=ddp.device)  # what AdamW's state and DDP's buckets will take
    timings: dict[int, tuple[float, int]] = {}
    spent_seconds, seconds, too_large = 0.0, 0.0, inf
    for size in sizes * REPETITIONS:  # in turn, so that other load on this host slows all sizes
        shortest, memory_bytes = timings.get(size, (inf, 0))
        if size >= too_large:
            continue
        if spent_seconds + min(shortest, 2 * seconds) > MEASURE_SECONDS:
            break
        seconds = _sum(ddp, _seconds(evaluator, size, sequence_tokens)) / ddp.ranks
        if seconds == inf:
            seconds, too_large = 0.0, size
            timings = {fitting: timing for fitting, timing in timings.items() if fitting < size}
        else:
            timings[size] = min(seconds, shortest), memory_bytes or ddp.memory_bytes()
            spent_seconds += seconds
    model.zero_grad(set_to_none=True)
    return timings


def _seconds(evaluator: Evaluator, size: int, sequence_tokens: int) -> float:
    """Seconds of a forward and backward pass on this rank, over random tokens; infinite if memory runs out."""
    started = time.perf_counter()
    try:
        tokens_BT = torch.randint(VOCABULARY, (size, sequence_tokens + 1), device=evaluator.ddp.device)
        with evaluator.autocast():
            loss = evaluator.model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        (loss / tokens_BT.numel()).backward()
        loss.item()  # waits for the device
    except torch.OutOfMemoryError:
        return inf
    return time.perf_counter() - started


def _sum(ddp: DDPConfig, value: float) -> float:
    return ddp.sum(torch.tensor(value, device=ddp.device)).item()
