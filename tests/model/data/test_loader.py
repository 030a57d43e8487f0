"""The window order: no window twice or missing, and the same batches for any number of ranks and micro-batches."""

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


def made_dataset(store: Store, sizes: list[int], split: str = "train") -> tuple[Manifest, list[np.ndarray]]:
    """A dataset of shards of exactly these sizes, put without a source: every token id says where it stands."""
    columns: dict[str, list[Any]] = {name: [] for name in ShardRow._fields}
    shards, at = [], 0
    for index, size in enumerate(sizes):
        ids = np.arange(at, at + size).astype("<u2")
        at += size
        shards.append(ids)
        store.put_new(DatasetKeys("made").shard(f"shard-{index}"), ids.tobytes())
        row = (f"shard-{index}", size, 1, 0, size, sha256(ids.tobytes()), split)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return Manifest("0" * 64, {}, tokenizer.identity(), {}, {}, None, columns), shards


def pairs(order: WindowOrder, first: int, count: int) -> list[tuple[int, int]]:
    shard_of, window_of = order.locate(first, count)
    return list(zip(shard_of.tolist(), window_of.tolist(), strict=True))


def windows_of(sizes: list[int], sequence_tokens: int) -> list[tuple[int, int]]:
    """Every window of the shards, counted the slow way: as long as T + 1 tokens are left."""
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
def test_any_slice_is_that_of_one_long_enumeration(
    sizes: list[int], sequence_tokens: int, seed: int, first: int, count: int
) -> None:
    if not windows_of(sizes, sequence_tokens):
        return
    order = WindowOrder(sizes, sequence_tokens, seed)
    one_by_one = [pairs(order, index, 1)[0] for index in range(first, first + count)]
    assert pairs(WindowOrder(sizes, sequence_tokens, seed), first, count) == one_by_one


def test_slices_go_on_over_borders_of_groups_and_of_epochs() -> None:
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
        [50] * 8 + [1] * 8 + [50],  # groups that may hold no window at all
        [1] * 20 + [11],
    ],
)
def test_shards_without_a_window_are_passed_over(sizes: list[int]) -> None:
    expected = windows_of(sizes, 10)
    for seed in range(20):
        assert sorted(pairs(WindowOrder(sizes, 10, seed), 0, len(expected))) == expected


@pytest.mark.parametrize("sizes", [[], [0], [1], [10], [10, 10, 3]])
def test_no_window_at_all_is_refused_with_a_remedy(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sequence_tokens(.|\n)*shard_tokens"):
        WindowOrder(sizes, 10, 0)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    sizes = [300] * 12
    order = WindowOrder(sizes, 10, 1)
    count = order.epoch_windows
    assert pairs(order, 0, count) == pairs(WindowOrder(sizes, 10, 1), 0, count)
    assert pairs(order, 0, count) != pairs(WindowOrder(sizes, 10, 2), 0, count)
    assert pairs(order, 0, count) != pairs(order, count, count)
    assert pairs(order, 0, count) != sorted(pairs(order, 0, count))


def test_order_of_a_seed_stays_the_same_in_later_versions() -> None:
    """A change of these numbers breaks the resume of every run that exists."""
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
    """FineWeb-Edu 10B in 10M-token shards, where a cursor on each rank loses 5.6 % and lets the ranks drift apart."""
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


def test_windows_are_the_very_tokens_of_the_shards(store: Store, built: tuple[RunConfig, Manifest]) -> None:
    _, manifest = built
    loader = DataLoader(store, "small", manifest, "train", sequence_tokens=32, seed=9)
    files = [
        np.fromfile(str(store.local_path(DatasetKeys("small").shard(row.shard_id))), "<u2")
        for row in manifest.rows("train")
    ]
    found = loader.windows(0, loader.order.epoch_windows)
    assert found.shape == (loader.order.epoch_windows, 33)
    assert found.dtype == np.uint16
    for tokens, (shard, window) in zip(found, pairs(loader.order, 0, len(found)), strict=True):
        assert np.array_equal(tokens, files[shard][window * 32 : window * 32 + 33])


def test_neighbours_share_one_token_and_a_shard_is_covered_but_for_its_tail(store: Store) -> None:
    manifest, shards = made_dataset(store, [1, 75, 10, 40])
    loader = DataLoader(store, "made", manifest, "train", sequence_tokens=10, seed=0)
    everything = loader.windows_in_file_order(np.arange(loader.order.epoch_windows))
    assert np.array_equal(everything[:7, :-1].ravel(), shards[1][:70])
    assert np.array_equal(everything[7:, :-1].ravel(), shards[3][:30])
    for before, after in pairwise(everything[:7]):
        assert before[-1] == after[0]
    assert loader.tokens == 126


def test_file_order_takes_the_windows_that_are_asked_for(store: Store) -> None:
    manifest, _ = made_dataset(store, [31, 1, 21, 0, 41])
    loader = DataLoader(store, "made", manifest, "train", sequence_tokens=10, seed=0)
    everything = loader.windows_in_file_order(np.arange(9))
    chosen = np.array([8, 0, 3, 5, 3])
    assert np.array_equal(loader.windows_in_file_order(chosen), everything[chosen])


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
def test_a_damaged_shard_is_never_read(store: Store, damage: str) -> None:
    manifest, shards = made_dataset(store, [100])
    path = store.local_path(DatasetKeys("made").shard("shard-0"))
    assert path is not None
    body = bytearray(shards[0].tobytes())
    body[50] ^= 1
    path.write_bytes({"flipped": bytes(body), "short": bytes(body[:100]), "empty": b""}[damage])
    loader = DataLoader(store, "made", manifest, "train", sequence_tokens=10, seed=0)
    with pytest.raises(ShardCorrupt) as caught:
        loader.windows(0, 1)
    for said in ("shard-0", manifest.columns["sha256"][0], sha256(path.read_bytes())):
        assert said in str(caught.value)


def test_a_missing_shard_is_named(store: Store) -> None:
    manifest, _ = made_dataset(store, [100])
    store.delete(DatasetKeys("made").shard("shard-0"))
    with pytest.raises(ObjectMissing, match="shard-0"):
        DataLoader(store, "made", manifest, "train", sequence_tokens=10, seed=0).windows(0, 1)


# Batches, as the trainer takes them


class OneOfMany(DDPConfig):
    """A rank whose others are played in turn: it adds nothing up."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def agree(self, value: int) -> bool:
        return value >= 0


class NotSynchronised(torch.nn.Module):
    """Stands for DistributedDataParallel where the other ranks are not there."""

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
    """For each step, the hashes of the windows that all ranks' forward passes together were given, sorted by rank."""
    seen: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    take = MicroBatches.next
    for rank in reversed(range(ranks)):  # the main rank last: it leaves a checkpoint, from which others would go on

        def keep(self: MicroBatches, mine: list[np.ndarray] = seen[rank]) -> Any:
            tokens_BT, targets_BT = take(self)
            assert len(tokens_BT) == micro_batch
            mine.append(torch.cat([tokens_BT, targets_BT[:, -1:]], 1).numpy().astype(np.uint16))
            return tokens_BT, targets_BT

        monkeypatch.setattr(MicroBatches, "next", keep)
        Trainer(store, job, OneOfMany(rank, ranks, CPU)).fit()
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


class Places:
    """Stands for a DataLoader: the tokens of a window are where it lies, its shard and its number there."""

    def __init__(self, order: WindowOrder, sequence_tokens: int) -> None:
        self.order, self.sequence_tokens = order, sequence_tokens

    def windows(self, first: int, count: int) -> np.ndarray:
        return np.stack(self.order.locate(first, count), 1)


@settings(deadline=None)
@given(
    SIZES, SEQUENCES, SEEDS, st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4),
    st.integers(0, 50),
)  # fmt: skip
def test_the_ranks_windows_are_the_orders_with_no_overlap_and_no_gap(
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
        batches = MicroBatches(Places(order, sequence_tokens), CPU, step=step, **share)  # type: ignore[arg-type]
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
def test_batch_of_a_step_is_the_same_for_any_ranks_and_micro_batch(
    store: Store, built: tuple[RunConfig, Manifest], ranks: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "DistributedDataParallel", NotSynchronised)
    config, manifest = built
    overrides = [f"train.micro_batch_sequences={micro_batch}", "train.batch_tokens=512", "train.max_steps=2"]
    wanted = tiny_config(config.store_url, config.data.source, *overrides, "train.validate_every_steps=0")
    job = training_job(pin_run(store, wanted, manifest.digest, None))
    order = DataLoader(store, "small", manifest, "train", sequence_tokens=32, seed=wanted.train.seed)
    expected = [
        [hashlib.sha256(window.tobytes()).hexdigest() for window in order.windows(step * 16, 16)] for step in range(2)
    ]
    assert trained_batches(store, job, ranks, micro_batch, monkeypatch) == expected
