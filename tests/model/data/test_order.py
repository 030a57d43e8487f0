"""Windows in file order, as validation and lineage count them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.order import WindowOrder

T = 10
SEEDS = st.integers(0, 2**32)
ANY = st.lists(st.integers(0, 80), min_size=1, max_size=30).filter(lambda sizes: max(sizes) > T)


@settings(deadline=None)
@given(ANY, SEEDS, st.data())
def test_windows_in_file_order_are_counted_shard_by_shard(sizes: list[int], seed: int, data: st.DataObject) -> None:
    order = WindowOrder(sizes, T, seed)
    windows = [(shard, start // T) for shard, size in enumerate(sizes) for start in range(0, size - T, T)]
    assert order.epoch_windows == len(windows)
    chosen = data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=20))
    shard_of, window_of = order.in_file_order(np.array(chosen, np.int64))
    assert list(zip(shard_of.tolist(), window_of.tolist(), strict=True)) == [windows[window] for window in chosen]
