"""The window order: every window exactly once an epoch, the same for a seed in every version."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.loading.order import WindowOrder
from tests.storage.loading.orders import SEEDS, SEQUENCES, SIZES, pairs, windows_of

T = 10
ANY = st.lists(st.integers(0, 80), min_size=1, max_size=30).filter(lambda sizes: max(sizes) > T)


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


@settings(deadline=None)
@given(ANY, SEEDS, st.data())
def test_read_in_file_order_are_counted_shard_by_shard(sizes: list[int], seed: int, data: st.DataObject) -> None:
    order = WindowOrder(sizes, T, seed)
    windows = [(shard, start // T) for shard, size in enumerate(sizes) for start in range(0, size - T, T)]
    assert order.epoch_windows == len(windows)
    chosen = data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=20))
    shard_of, window_of = order.in_file_order(np.array(chosen, np.int64))
    assert list(zip(shard_of.tolist(), window_of.tolist(), strict=True)) == [windows[window] for window in chosen]
