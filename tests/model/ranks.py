"""The ranks of a small training as processes of their own, in a real process group of gloo, watched from inside."""

import hashlib
import multiprocessing
import os
import socket
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch

from model.data.loader import MicroBatches
from model.processes.distributed import DDPConfig
from model.runs.job import read_job
from model.training import trainer
from model.training.trainer import Trainer
from storage.stores.opening import open_store

STUCK_SECONDS = 120


class Asked(NamedTuple):
    """A training, and the step before which it is asked to stop, if any; `gradients` asks for those of step 0 alone."""

    store_url: str
    job_key: str
    stop_at: int | None = None
    gradients: bool = False


class Seen(NamedTuple):
    """What a training took: the windows of each step in the order of the ranks, hashed, and its first gradients."""

    steps: dict[int, list[str]]
    gradients: np.ndarray | None


def hashes(windows: np.ndarray) -> list[str]:
    """A digest of each window, whatever the type of its ids."""
    return [hashlib.sha256(window.astype("<i8").tobytes()).hexdigest() for window in windows]


def train(trainings: list[Asked], ranks: int) -> list[Seen]:
    """Let so many ranks do one training after the other, each until its end or its stop.

    The ranks are processes with one group for all trainings: to import torch takes each of them 4 s.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(ranks)]
    processes = [
        context.Process(target=_serve, args=(theirs, trainings, rank, ranks, port))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        return [_together([ours for ours, _ in pipes]) for _ in trainings]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _together(lines: list[Connection]) -> Seen:
    """What all ranks say of one training."""
    answers = [line.recv() if line.poll(STUCK_SECONDS) else "no answer" for line in lines]
    assert all(isinstance(answer, Seen) for answer in answers), answers
    steps = {step: [one for answer in answers for one in answer.steps[step]] for step in answers[0].steps}
    assert all(set(answer.steps) == set(steps) for answer in answers)
    return Seen(steps, answers[0].gradients)


def _serve(line: Connection, trainings: list[Asked], rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ddp = DDPConfig.detect(os.environ, "cpu")
    try:
        with ddp.process_group(timedelta(minutes=1)):
            for asked in trainings:
                line.send(_one(asked, ddp))
                ddp.sum(torch.zeros(1))  # nobody begins the next one while the main rank still saves
    except Exception as error:
        line.send(repr(error))


def _one(asked: Asked, ddp: DDPConfig) -> Seen:
    store = open_store(asked.store_url)
    steps: dict[int, list[str]] = {}
    first: list[torch.Tensor] = []
    take, clip = MicroBatches.next, torch.nn.utils.clip_grad_norm_

    def noting(self: MicroBatches) -> Any:
        tokens_BT, targets_BT = take(self)
        hashed = steps.setdefault(training.step, [])
        hashed += hashes(torch.cat([tokens_BT, targets_BT[:, -1:]], 1).numpy())
        return tokens_BT, targets_BT

    def keeping(parameters: Any, most: float) -> torch.Tensor:
        weights = list(parameters)
        if asked.gradients and not first:
            first.append(torch.cat([weight.grad.flatten() for weight in weights]))
        if training.step == asked.stop_at:
            training._on_sigterm(0, None)
        return clip(weights, most)

    MicroBatches.next, trainer.torch.nn.utils.clip_grad_norm_ = noting, keeping  # type: ignore[method-assign,assignment]
    try:
        training = Trainer(store, read_job(store, asked.job_key), ddp)
        training.fit()
    finally:
        MicroBatches.next, trainer.torch.nn.utils.clip_grad_norm_ = take, clip  # type: ignore[method-assign]
    return Seen(steps, first[0].numpy() if first and ddp.is_main else None)
