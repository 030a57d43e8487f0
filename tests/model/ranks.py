"""The ranks of a small training as child processes in a real gloo process group, with their batches recorded."""

import hashlib
import multiprocessing
import os
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch

from model.data.loader import DataLoader
from model.processes.distributed import DDPConfig
from model.runs.job import read_job
from model.training import trainer
from model.training.trainer import Trainer
from storage.stores.opening import open_store
from tests.polling import PATIENCE_SECONDS
from tests.ports import free_port


class TrainingRequest(NamedTuple):
    """A training, the step before which it stops, if any, and whether to return the gradients of step 0."""

    store_url: str
    job_key: str
    stop_at: int | None = None
    gradients: bool = False


class ObservedTraining(NamedTuple):
    """The windows of each step, hashed and in the order of the ranks, and the gradients of step 0."""

    steps: dict[int, list[str]]
    gradients: np.ndarray | None


class SoloRank(DDPConfig):
    """One of several ranks that run one after the other, so it cannot sum over them."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def agree(self, value: int) -> bool:
        return value >= 0


class UnsynchronisedModel(torch.nn.Module):
    """Replaces DistributedDataParallel where the other ranks do not run."""

    def __init__(self, module: torch.nn.Module, **_: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.module(*tensors)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()


def hashes(windows: np.ndarray) -> list[str]:
    """A digest of each window, independent of the dtype of its ids."""
    return [hashlib.sha256(window.astype("<i8").tobytes()).hexdigest() for window in windows]


def train(trainings: list[TrainingRequest], ranks: int) -> list[ObservedTraining]:
    """Run the trainings one after the other, each to its end or stop, on this number of ranks.

    The ranks are started once for all trainings, because importing torch takes each of them 4 s.
    """
    port = free_port()
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(ranks)]
    processes = [
        context.Process(target=_serve, args=(theirs, trainings, rank, ranks, port))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        return [_gather([ours for ours, _ in pipes]) for _ in trainings]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _gather(connections: list[Connection]) -> ObservedTraining:
    """Collect one training from all ranks."""
    answers = [connection.recv() if connection.poll(PATIENCE_SECONDS) else "no answer" for connection in connections]
    assert all(isinstance(answer, ObservedTraining) for answer in answers), answers
    steps = {step: [window for answer in answers for window in answer.steps[step]] for step in answers[0].steps}
    assert all(set(answer.steps) == set(steps) for answer in answers)
    return ObservedTraining(steps, answers[0].gradients)


def _serve(connection: Connection, trainings: list[TrainingRequest], rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "INIT_METHOD": "env://"}
    ddp = DDPConfig.detect(os.environ, "cpu")
    try:
        with ddp.process_group(1.0):
            for request in trainings:
                connection.send(_observe(request, ddp))
                ddp.sum(torch.zeros(1))  # no rank starts the next training while the main rank still saves
    except Exception as error:
        connection.send(repr(error))


def _observe(request: TrainingRequest, ddp: DDPConfig) -> ObservedTraining:
    store = open_store(request.store_url)
    steps: dict[int, list[str]] = {}
    first: list[torch.Tensor] = []
    take, clip = DataLoader.next, torch.nn.utils.clip_grad_norm_

    def recording(self: DataLoader) -> Any:
        tokens_BT, targets_BT = take(self)
        hashed = steps.setdefault(training.step, [])
        hashed += hashes(torch.cat([tokens_BT, targets_BT[:, -1:]], 1).numpy())
        return tokens_BT, targets_BT

    def clipping(parameters: Any, most: float) -> torch.Tensor:
        weights = list(parameters)
        if request.gradients and not first:
            first.append(torch.cat([weight.grad.flatten() for weight in weights]))
        if training.step == request.stop_at:
            training._on_stop_signal(0, None)
        return clip(weights, most)

    DataLoader.next, trainer.torch.nn.utils.clip_grad_norm_ = recording, clipping  # type: ignore[method-assign,assignment]  # put back below
    try:
        training = Trainer(store, read_job(store, request.job_key), ddp)
        training.fit()
    finally:
        DataLoader.next, trainer.torch.nn.utils.clip_grad_norm_ = take, clip  # type: ignore[method-assign]
    return ObservedTraining(steps, first[0].numpy() if first and ddp.is_main else None)
