"""Four processes that play the ranks of many small trainings, one after the other: torch is imported once in each.

A training of W ranks is a real process group of gloo over the first W of them.
"""

import hashlib
import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from model import trainer
from model.distributed import DDPConfig
from model.job import read_job
from model.loader import MicroBatches
from model.trainer import Trainer
from storage.layout import open_store

MOST_RANKS = 4


class Asked(NamedTuple):
    """A training, and the step before which it is asked to stop, if any; `gradients` asks for those of step 0 alone."""

    store_url: str
    job_key: str
    stop_at: int | None = None
    gradients: bool = False


class Seen(NamedTuple):
    """What a training took: the windows of each step in the order of the ranks, hashed, and its first gradients."""

    steps: dict[int, list[str]]
    gradients: torch.Tensor | None


class Ranks:
    """The processes, waiting."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._lines: list[Connection] = []
        for _ in range(MOST_RANKS):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs,), daemon=True).start()
            self._lines.append(ours)

    def train(self, asked: Asked, ranks: int) -> Seen:
        """Let so many ranks do the training, until its end or its stop."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            self._lines[rank].send((asked, rank, ranks, port))
        answers = [self._lines[rank].recv() for rank in range(ranks)]
        assert all(isinstance(answer, Seen) for answer in answers), answers
        steps = {step: [one for answer in answers for one in answer.steps[step]] for step in answers[0].steps}
        assert all(set(answer.steps) == set(steps) for answer in answers)
        return Seen(steps, answers[0].gradients)

    def close(self) -> None:
        for line in self._lines:
            line.send(None)


@contextmanager
def serving() -> Iterator[Ranks]:
    found = Ranks()
    try:
        yield found
    finally:
        found.close()


def _serve(line: Connection) -> None:
    torch.set_num_threads(1)
    while (order := line.recv()) is not None:
        try:
            line.send(_one(*order))
        except Exception as error:
            line.send(repr(error))


def _one(asked: Asked, rank: int, ranks: int, port: int) -> Seen:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = open_store(asked.store_url)
    ddp = DDPConfig.detect(os.environ, "cpu")
    steps: dict[int, list[str]] = {}
    first: list[torch.Tensor] = []
    take, clip = MicroBatches.next, torch.nn.utils.clip_grad_norm_

    def noting(self: MicroBatches, device: torch.device) -> Any:
        tokens_BT, targets_BT = take(self, device)
        hashed = steps.setdefault(training.step, [])
        for window in torch.cat([tokens_BT, targets_BT[:, -1:]], 1).numpy():
            hashed.append(hashlib.sha256(window.tobytes()).hexdigest())
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
        with ddp.process_group(timedelta(minutes=1)):
            training = Trainer(store, read_job(store, asked.job_key), ddp)
            training.fit()
    finally:
        MicroBatches.next, trainer.torch.nn.utils.clip_grad_norm_ = take, clip  # type: ignore[method-assign]
    return Seen(steps, first[0] if first and rank == 0 else None)
