"""What lineage asks of the order of windows: which shards came before a window, and windows counted shard by shard."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.order import GROUP_SHARDS, WindowOrder

T = 10
SEEDS = st.integers(0, 2**32)
WITH_A_WINDOW = st.lists(st.integers(T + 1, 80), min_size=1, max_size=30)
ANY = st.lists(st.integers(0, 80), min_size=1, max_size=30).filter(lambda sizes: max(sizes) > T)


def used(order: WindowOrder, first: int) -> set[int]:
    """The shards that windows 0 up to `first` lie in, asked window by window."""
    return set(order.locate(0, first)[0].tolist())


def groups(order: WindowOrder, shards: int) -> list[set[int]]:
    """The first epoch's shards as they are read, so many at a time: every one of them has a window."""
    found: list[set[int]] = []
    window = 0
    while window < order.epoch_windows:
        size = min(GROUP_SHARDS, shards - GROUP_SHARDS * len(found))
        found.append(set(order.soon(window)[:size]))
        window += int(order.windows_of_shard[list(found[-1])].sum())
    return found


@settings(deadline=None)
@given(WITH_A_WINDOW, SEEDS, st.integers(0, 300))
def test_shards_before_a_window_are_the_groups_that_were_begun(sizes: list[int], seed: int, first: int) -> None:
    order = WindowOrder(sizes, T, seed)
    seen = used(order, first)
    begun = [group for group in groups(order, len(sizes)) if group & seen]
    assert order.shards_before(first) == sorted(set().union(*begun))


@settings(deadline=None)
@given(WITH_A_WINDOW, SEEDS)
def test_shards_before_are_exact_where_a_group_ends(sizes: list[int], seed: int) -> None:
    order = WindowOrder(sizes, T, seed)
    first, expected = 0, set[int]()
    for group in groups(order, len(sizes)):
        assert set(order.shards_before(first)) == expected == used(order, first)
        first += int(order.windows_of_shard[list(group)].sum())
        expected |= group
    assert first == order.epoch_windows
    for more in (first, first + 1, 5 * first + 3):
        assert order.shards_before(more) == sorted(expected)


@settings(deadline=None)
@given(ANY, SEEDS, st.integers(0, 300))
def test_no_shard_without_a_window_comes_before_one(sizes: list[int], seed: int, first: int) -> None:
    order = WindowOrder(sizes, T, seed)
    before = order.shards_before(first)
    assert used(order, first) <= set(before)
    assert [shard for shard in before if sizes[shard] <= T] == []


@settings(deadline=None)
@given(ANY, SEEDS, st.data())
def test_windows_in_file_order_are_counted_shard_by_shard(sizes: list[int], seed: int, data: st.DataObject) -> None:
    order = WindowOrder(sizes, T, seed)
    windows = [(shard, start // T) for shard, size in enumerate(sizes) for start in range(0, size - T, T)]
    assert order.epoch_windows == len(windows)
    chosen = data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=20))
    shard_of, window_of = order.in_file_order(np.array(chosen, np.int64))
    assert list(zip(shard_of.tolist(), window_of.tolist(), strict=True)) == [windows[window] for window in chosen]
