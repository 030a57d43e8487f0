"""Each rank takes its slice of the same batches, for any number of ranks and micro-batches."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import RunConfig
from model.data.loader import DataLoader, inputs_and_targets, widened
from model.runs.job import Job
from model.runs.run import pin_run, training_job
from model.training import trainer
from model.training.trainer import Trainer
from storage.datasets.manifest import Manifest
from storage.loading.order import WindowOrder
from storage.loading.windows import Windows
from storage.stores.store import Store
from tests.making import tiny_config
from tests.model.ranks import SoloRank, UnsynchronisedModel
from tests.storage.loading.orders import SEEDS, SEQUENCES, SIZES, pairs, windows_of

CPU = torch.device("cpu")


@pytest.fixture
def built(config: RunConfig, build: Callable[[RunConfig], Manifest]) -> tuple[RunConfig, Manifest]:
    return config, build(config)


def test_targets_are_the_tokens_that_follow() -> None:
    tokens_BT, targets_BT = inputs_and_targets(widened(np.array([[1, 2, 3], [50_256, 5, 65_535]], np.uint16), CPU), CPU)
    assert tokens_BT.tolist() == [[1, 2], [50_256, 5]]
    assert targets_BT.tolist() == [[2, 3], [5, 65_535]]
    assert tokens_BT.dtype == targets_BT.dtype == torch.int64


def trained_batches(
    store: Store, job: Job, ranks: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """For each step, the hashes of the windows of all ranks' forward passes, ordered by rank."""
    seen: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    take = DataLoader.next
    for rank in reversed(range(ranks)):  # the main rank last, because the others would resume from its checkpoint

        def keep(self: DataLoader, mine: list[np.ndarray] = seen[rank]) -> Any:
            tokens_BT, targets_BT = take(self)
            assert len(tokens_BT) == micro_batch
            mine.append(torch.cat([tokens_BT, targets_BT[:, -1:]], 1).numpy().astype(np.uint16))
            return tokens_BT, targets_BT

        monkeypatch.setattr(DataLoader, "next", keep)
        Trainer(store, job, SoloRank(rank, ranks, CPU)).fit()
    steps, micro_batches = 2, 16 // ranks // micro_batch
    assert [len(mine) for mine in seen] == [steps * micro_batches] * ranks
    return [
        [
            hashlib.sha256(window.tobytes()).hexdigest()
            for mine in seen
            for windows in mine[step * micro_batches : (step + 1) * micro_batches]
            for window in windows
        ]
        for step in range(steps)
    ]


class LocationLoader:
    """Replaces Windows: the tokens of a window are its shard and its number in the shard."""

    def __init__(self, order: WindowOrder, sequence_tokens: int) -> None:
        self.order, self.sequence_tokens = order, sequence_tokens

    def read(self, first: int, count: int) -> np.ndarray:
        return np.stack(self.order.locate(first, count), 1)


@settings(deadline=None)
@given(
    SIZES, SEQUENCES, SEEDS, st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4),
    st.integers(0, 50),
)  # fmt: skip
def test_the_ranks_share_the_windows_without_overlap_or_gap(
    sizes: list[int], sequence_tokens: int, seed: int, ranks: int, size: int, micro_batches: int, ahead: int,
    step: int,
) -> None:  # fmt: skip
    if not windows_of(sizes, sequence_tokens):
        return
    order = WindowOrder(sizes, sequence_tokens, seed)
    batch_windows, steps = ranks * size * micro_batches, 3
    shares: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        share = {"batch_windows": batch_windows, "size": size, "rank": rank, "ranks": ranks, "ahead": ahead}
        batches = DataLoader(LocationLoader(order, sequence_tokens), CPU, step=step, **share)  # type: ignore[arg-type]
        for taken in shares:
            for _ in range(micro_batches):
                shard_B1, window_B1 = batches.next()
                assert len(shard_B1) == size
                taken.extend(zip(shard_B1.flatten().tolist(), window_B1.flatten().tolist(), strict=True))
        batches.close()
    for number, taken in enumerate(shares, step):
        assert taken == pairs(order, number * batch_windows, batch_windows)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_batch_of_a_step_does_not_depend_on_ranks_and_micro_batch(
    store: Store, built: tuple[RunConfig, Manifest], ranks: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "DistributedDataParallel", UnsynchronisedModel)
    config, manifest = built
    overrides = [f"train.micro_batch_sequences={micro_batch}", "train.batch_tokens=512", "train.max_steps=2"]
    run_config = tiny_config(config.store_url, config.data.source, *overrides, "train.validate_every_steps=0")
    job = training_job(pin_run(store, run_config, manifest.digest, None))
    order = Windows(store, "small", manifest, "train", sequence_tokens=32, seed=run_config.train.seed)
    expected = [
        [hashlib.sha256(window.tobytes()).hexdigest() for window in order.read(step * 16, 16)] for step in range(2)
    ]
    assert trained_batches(store, job, ranks, micro_batch, monkeypatch) == expected
