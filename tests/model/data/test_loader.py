"""The window order: every window exactly once, and the same batches for any number of ranks and micro-batches."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import tokenizer
from model.config import RunConfig
from model.data.loader import DataLoader, MicroBatches, inputs_and_targets, widened
from model.data.order import WindowOrder
from model.processes.distributed import DDPConfig
from model.runs.job import Job
from model.runs.run import pin_run, training_job
from model.training import trainer
from model.training.trainer import Trainer
from storage.datasets.manifest import Manifest, ShardRow
from storage.digests import sha256
from storage.errors import ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys
from storage.stores.store import Store
from tests.making import tiny_config

CPU = torch.device("cpu")
SIZES = st.lists(st.integers(0, 120), min_size=1, max_size=30)
SEQUENCES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32)


@pytest.fixture
def built(config: RunConfig, build: Callable[[RunConfig], Manifest]) -> tuple[RunConfig, Manifest]:
    return config, build(config)


def put_dataset(store: Store, sizes: list[int], split: str = "train") -> tuple[Manifest, list[np.ndarray]]:
    """Store shards of exactly these sizes, without a source. Each token id is its position."""
    columns: dict[str, list[Any]] = {name: [] for name in ShardRow._fields}
    shards, start = [], 0
    for index, size in enumerate(sizes):
        ids = np.arange(start, start + size).astype("<u2")
        start += size
        shards.append(ids)
        store.put_new(DatasetKeys("synthetic").shard(f"shard-{index}"), ids.tobytes())
        row = (f"shard-{index}", size, 1, 0, size, sha256(ids.tobytes()), split, 0)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return Manifest("0" * 64, {}, tokenizer.identity(), {}, {}, None, columns), shards


def pairs(order: WindowOrder, first: int, count: int) -> list[tuple[int, int]]:
    shard_of, window_of = order.locate(first, count)
    return list(zip(shard_of.tolist(), window_of.tolist(), strict=True))


def windows_of(sizes: list[int], sequence_tokens: int) -> list[tuple[int, int]]:
    """Every window of the shards, enumerated one by one while T + 1 tokens are left."""
    return [
        (shard, start // sequence_tokens)
        for shard, size in enumerate(sizes)
        for start in range(0, size, sequence_tokens)
        if start + sequence_tokens + 1 <= size
    ]


# The order


@settings(deadline=None)
@given(SIZES, SEQUENCES, SEEDS)
def test_each_epoch_holds_every_window_exactly_once(sizes: list[int], sequence_tokens: int, seed: int) -> None:
    expected = windows_of(sizes, sequence_tokens)
    if not expected:
        return
    order = WindowOrder(sizes, sequence_tokens, seed)
    assert order.epoch_windows == len(expected)
    for epoch in range(3):
        assert sorted(pairs(order, epoch * len(expected), len(expected))) == expected


@settings(deadline=None)
@given(SIZES, SEQUENCES, SEEDS, st.integers(0, 400), st.integers(0, 400))
def test_any_slice_equals_that_of_the_whole_order(
    sizes: list[int], sequence_tokens: int, seed: int, first: int, count: int
) -> None:
    if not windows_of(sizes, sequence_tokens):
        return
    order = WindowOrder(sizes, sequence_tokens, seed)
    one_by_one = [pairs(order, index, 1)[0] for index in range(first, first + count)]
    assert pairs(WindowOrder(sizes, sequence_tokens, seed), first, count) == one_by_one


def test_slices_cross_group_and_epoch_borders() -> None:
    sizes = [33 + 8 * index for index in range(20)]  # three groups
    order = WindowOrder(sizes, 8, 5)
    whole = [pair for index in range(3 * order.epoch_windows) for pair in pairs(order, index, 1)]
    for length in (1, 7, order.epoch_windows - 1, order.epoch_windows, order.epoch_windows + 1):
        for first in range(0, len(whole) - length, 13):
            assert pairs(order, first, length) == whole[first : first + length]


@pytest.mark.parametrize(
    "sizes",
    [
        [50, 1, 50, 50],
        [50, 50, 50, 1],
        [1, 50],
        [50, 0, 50],
        [50, 10, 50],  # 10 tokens: one too few for a window of T = 10
        [50] * 8 + [1] * 8 + [50],  # groups that may hold no window
        [1] * 20 + [11],
    ],
)
def test_shards_without_a_window_are_skipped(sizes: list[int]) -> None:
    expected = windows_of(sizes, 10)
    for seed in range(20):
        assert sorted(pairs(WindowOrder(sizes, 10, seed), 0, len(expected))) == expected


@pytest.mark.parametrize("sizes", [[], [0], [1], [10], [10, 10, 3]])
def test_shards_without_any_window_are_refused_with_a_remedy(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sequence_tokens(.|\n)*shard_tokens"):
        WindowOrder(sizes, 10, 0)


def test_order_depends_only_on_seed_and_epoch() -> None:
    sizes = [300] * 12
    order = WindowOrder(sizes, 10, 1)
    count = order.epoch_windows
    assert pairs(order, 0, count) == pairs(WindowOrder(sizes, 10, 1), 0, count)
    assert pairs(order, 0, count) != pairs(WindowOrder(sizes, 10, 2), 0, count)
    assert pairs(order, 0, count) != pairs(order, count, count)
    assert pairs(order, 0, count) != sorted(pairs(order, 0, count))


def test_order_of_a_seed_stays_the_same_in_later_versions() -> None:
    """A change of these numbers breaks the resume of every existing run."""
    golden = [(2, 0), (1, 1), (0, 2), (1, 0), (0, 0), (0, 1), (0, 1), (0, 2), (1, 1), (1, 0), (2, 0), (0, 0)]
    assert pairs(WindowOrder([40, 30, 20], 10, 1337), 0, 12) == golden


def test_reads_stay_within_eight_shards_at_a_time() -> None:
    sizes = [101 + 10 * (index % 5) for index in range(40)]
    order = WindowOrder(sizes, 10, 3)
    left = {shard: len([0 for other, _ in windows_of(sizes, 10) if other == shard]) for shard in range(40)}
    opened: set[int] = set()
    most = 0
    for shard, _ in pairs(order, 0, order.epoch_windows):
        opened.add(shard)
        most = max(most, len(opened))
        left[shard] -= 1
        if not left[shard]:
            opened.discard(shard)
    assert most == 8


def test_the_full_size_run_uses_all_but_the_tails_and_wraps_in_the_middle_of_a_batch() -> None:
    """FineWeb-Edu 10B in 10M-token shards. One cursor per rank would lose 5.6 % and let the ranks drift apart."""
    sizes = [10_000_000] * 988 + [2_590_278]
    order = WindowOrder(sizes, 512, 1337)
    assert order.epoch_windows == 988 * 19_531 + 5_059
    assert sum(sizes) - order.epoch_windows * 512 <= 512 * len(sizes)
    last_step, rest = divmod(order.epoch_windows, 1_024)
    assert last_step == 18_849
    batch = pairs(order, last_step * 1_024, 1_024)
    assert len(set(batch[:rest])) == rest
    assert batch[rest:] == pairs(order, order.epoch_windows, 1_024 - rest)
    assert not set(batch[:rest]) & set(pairs(order, (last_step - 8) * 1_024, 8 * 1_024))


def test_windows_are_mixed_within_a_group() -> None:
    first = pairs(WindowOrder([1001] * 40, 10, 0), 0, 64)
    assert len({shard for shard, _ in first}) == 8
    assert len({window // 10 for _, window in first}) >= 8  # from all over the shards


# Tokens


def test_windows_hold_the_tokens_of_the_shards(store: Store, built: tuple[RunConfig, Manifest]) -> None:
    _, manifest = built
    loader = DataLoader(store, "small", manifest, "train", sequence_tokens=32, seed=9)
    files = [
        np.fromfile(str(store.local_path(DatasetKeys("small").shard(row.shard_id))), "<u2")
        for row in manifest.rows("train")
    ]
    windows = loader.windows(0, loader.order.epoch_windows)
    assert windows.shape == (loader.order.epoch_windows, 33)
    assert windows.dtype == np.uint16
    for tokens, (shard, window) in zip(windows, pairs(loader.order, 0, len(windows)), strict=True):
        assert np.array_equal(tokens, files[shard][window * 32 : window * 32 + 33])


def test_neighbouring_windows_share_one_token_and_cover_the_shard_except_its_tail(store: Store) -> None:
    manifest, shards = put_dataset(store, [1, 75, 10, 40])
    loader = DataLoader(store, "synthetic", manifest, "train", sequence_tokens=10, seed=0)
    windows = loader.windows_in_file_order(np.arange(loader.order.epoch_windows))
    assert np.array_equal(windows[:7, :-1].ravel(), shards[1][:70])
    assert np.array_equal(windows[7:, :-1].ravel(), shards[3][:30])
    for before, after in pairwise(windows[:7]):
        assert before[-1] == after[0]
    assert loader.tokens == 126


def test_file_order_returns_the_requested_windows(store: Store) -> None:
    manifest, _ = put_dataset(store, [31, 1, 21, 0, 41])
    loader = DataLoader(store, "synthetic", manifest, "train", sequence_tokens=10, seed=0)
    windows = loader.windows_in_file_order(np.arange(9))
    chosen = np.array([8, 0, 3, 5, 3])
    assert np.array_equal(loader.windows_in_file_order(chosen), windows[chosen])


def test_splits_do_not_mix(store: Store, built: tuple[RunConfig, Manifest]) -> None:
    _, manifest = built
    train, val = (DataLoader(store, "small", manifest, split, sequence_tokens=8, seed=0) for split in ("train", "val"))
    assert train.tokens + val.tokens == sum(row.tokens for row in manifest.rows())
    assert val.tokens == sum(row.tokens for row in list(manifest.rows())[:2])


def test_targets_are_the_tokens_that_follow() -> None:
    tokens_BT, targets_BT = inputs_and_targets(widened(np.array([[1, 2, 3], [50_256, 5, 65_535]], np.uint16), CPU), CPU)
    assert tokens_BT.tolist() == [[1, 2], [50_256, 5]]
    assert targets_BT.tolist() == [[2, 3], [5, 65_535]]
    assert tokens_BT.dtype == targets_BT.dtype == torch.int64


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_shard_is_refused(store: Store, damage: str) -> None:
    manifest, shards = put_dataset(store, [100])
    path = store.local_path(DatasetKeys("synthetic").shard("shard-0"))
    assert path is not None
    body = bytearray(shards[0].tobytes())
    body[50] ^= 1
    path.write_bytes({"flipped": bytes(body), "short": bytes(body[:100]), "empty": b""}[damage])
    loader = DataLoader(store, "synthetic", manifest, "train", sequence_tokens=10, seed=0)
    with pytest.raises(ShardCorrupt) as caught:
        loader.windows(0, 1)
    for fact in ("shard-0", manifest.columns["sha256"][0], sha256(path.read_bytes())):
        assert fact in str(caught.value)


def test_a_missing_shard_is_named(store: Store) -> None:
    manifest, _ = put_dataset(store, [100])
    store.delete(DatasetKeys("synthetic").shard("shard-0"))
    with pytest.raises(ObjectMissing, match="shard-0"):
        DataLoader(store, "synthetic", manifest, "train", sequence_tokens=10, seed=0).windows(0, 1)


# The trainer's batches


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


def trained_batches(
    store: Store, job: Job, ranks: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """For each step, the hashes of the windows of all ranks' forward passes, ordered by rank."""
    seen: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    take = MicroBatches.next
    for rank in reversed(range(ranks)):  # the main rank last, because the others would resume from its checkpoint

        def keep(self: MicroBatches, mine: list[np.ndarray] = seen[rank]) -> Any:
            tokens_BT, targets_BT = take(self)
            assert len(tokens_BT) == micro_batch
            mine.append(torch.cat([tokens_BT, targets_BT[:, -1:]], 1).numpy().astype(np.uint16))
            return tokens_BT, targets_BT

        monkeypatch.setattr(MicroBatches, "next", keep)
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
    """Replaces a DataLoader: the tokens of a window are its shard and its number in the shard."""

    def __init__(self, order: WindowOrder, sequence_tokens: int) -> None:
        self.order, self.sequence_tokens = order, sequence_tokens

    def windows(self, first: int, count: int) -> np.ndarray:
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
        batches = MicroBatches(LocationLoader(order, sequence_tokens), CPU, step=step, **share)  # type: ignore[arg-type]
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
    order = DataLoader(store, "small", manifest, "train", sequence_tokens=32, seed=run_config.train.seed)
    expected = [
        [hashlib.sha256(window.tobytes()).hexdigest() for window in order.windows(step * 16, 16)] for step in range(2)
    ]
    assert trained_batches(store, job, ranks, micro_batch, monkeypatch) == expected
