"""Chooses the size of micro-batches, which changes no batch: fixed for a short run, measured once for long ones."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, field
from math import inf
from statistics import fmean
from typing import Any

import torch
from pydantic.dataclasses import dataclass

from model.config import Positive, TrainingConfig
from model.evaluation.evaluator import Evaluator
from model.processes.distributed import DDPConfig
from model.tokenizer import VOCABULARY
from model.training.flops import flops_per_token, parameter_count, peak_flops
from storage import keys
from storage.digests import canonical_json, digest
from storage.stores.store import Body, Store, put_once, read_as

FIXED_TOKENS = {"cpu": 1_024, "mps": 1_024, "cuda": 32_768}  # four times as many must fit, except on CUDA
REPETITIONS = 10
MEASURE_SECONDS = 30.0
PEAK_FLOPS = {"cpu": 2.5e11, "mps": 5e12, "cuda": 1e14}  # if the device's own is unknown; the CPU has two cores
USUAL_MFU = 0.4  # that of an H100 with the 124M model


@dataclass(frozen=True)
class Speed:
    """The fastest size of micro-batch in a setup. Without timings: the size after a run had run out of memory."""

    setup: dict[str, Any]  # what decides which sizes fit and how fast they are: device, model, batch, versions
    sequences: Positive
    tokens_per_second: float = 0.0  # of all ranks, without the optimizer's step
    timings: dict[int, tuple[float, int]] = field(default_factory=dict)  # by size: seconds of one, peak bytes


def choose_sequences(store: Store, evaluator: Evaluator, config: TrainingConfig, setup: dict[str, Any]) -> int:
    """Sequences per micro-batch, the same on all ranks. Leaves the weights unchanged. Raises ObjectCorrupt."""
    ddp, model, windows = evaluator.ddp, evaluator.model, config.batch_windows // evaluator.ddp.ranks
    largest = windows & -windows  # the largest power of two that divides them
    fixed = min(1 << max(FIXED_TOKENS[ddp.device.type] // config.sequence_tokens, 1).bit_length() - 1, largest)
    flops = flops_per_token(model.config, config.sequence_tokens) * config.batch_tokens
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
    """The mean seconds by size, and the peak memory of the sizes up to it. Ends in time, on all ranks alike.

    Not the shortest or the median: on a shared host they chose up to 13 % and 16 % wrong, the mean of 4 passes 2 %.
    """
    ddp, model = evaluator.ddp, evaluator.model.train()
    _spare = torch.empty(3 * parameter_count(model.config), device=ddp.device)  # of AdamW's state and DDP's buckets
    timings: dict[int, tuple[float, int]] = {}
    samples = defaultdict[int, list[float]](list)
    spent_seconds, seconds, too_large = 0.0, 0.0, inf
    for size in sizes * REPETITIONS:  # in turn, so that other load on this host slows all sizes
        expected, memory_bytes = timings.get(size, (inf, 0))
        if size >= too_large:
            continue
        if spent_seconds + min(expected, 2 * seconds) > MEASURE_SECONDS:
            break
        seconds = _sum(ddp, _seconds(evaluator, size, sequence_tokens)) / ddp.ranks
        if seconds == inf:
            seconds, too_large = 0.0, size
            timings = {fitting: timing for fitting, timing in timings.items() if fitting < size}
        else:
            samples[size].append(seconds)
            warm = samples[size][len(samples[size]) == REPETITIONS :]  # after all repetitions, drop the warm-up
            timings[size] = fmean(warm), memory_bytes or ddp.memory_bytes()
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


def read_speed(store: Store, setup: dict[str, Any]) -> Speed | None:
    """The speed in the setup, or None if it is unknown. Raises ObjectCorrupt if it is damaged."""
    windows = setup["batch_tokens"] // setup["sequence_tokens"] // setup["ranks"]
    key, fits = keys.speed(digest(setup)), (setup, 0)
    return read_as(store, key, Speed, lambda speed: (speed.setup, windows % speed.sequences) == fits)


def put_speed(store: Store, speed: Speed, put: Callable[[Store, str, Body], None] = put_once) -> Speed:
    """Store the speed: unless one is stored, or with `overwrite` in any case. Returns the stored one."""
    put(store, keys.speed(digest(speed.setup)), canonical_json(asdict(speed)))
    return read_speed(store, speed.setup) or speed
