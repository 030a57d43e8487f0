"""A mix is exact to one window in every prefix, and each dataset keeps its own order and its own pace."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import RunConfig
from storage.datasets.manifest import Manifest
from storage.loading import order
from storage.loading.mix import MixedOrder, Share, describe, parse_mix, weighted_mean
from storage.loading.order import WindowOrder
from storage.loading.windows import MixedWindows, Windows
from storage.stores.store import Store
from tests.conftest import BuildDataset
from tests.making import build_other
from tests.storage.loading.orders import SEEDS, pairs

NAMES = st.sampled_from(["a", "b-2", "c.d", "web", "code"])
WEIGHTS = st.dictionaries(NAMES, st.integers(1, 20), min_size=1)
T = 32


def mix_of(weights: dict[str, int]) -> dict[str, Share]:
    return {dataset: Share("0" * 64, weight) for dataset, weight in weights.items()}


def located(mixed: MixedOrder, first: int, count: int) -> list[tuple[str, int]]:
    """The dataset of each window, and its number in that dataset's order."""
    windows: list[tuple[str, int]] = [("", -1)] * count
    for dataset, start, places in mixed.parts(first, count):
        for number, place in enumerate(places.tolist(), start):
            windows[place] = dataset, number
    return windows


@settings(deadline=None, max_examples=50)
@given(WEIGHTS)
def test_shares_are_exact_to_one_window_in_every_prefix(weights: dict[str, int]) -> None:
    mixed, period = MixedOrder(mix_of(weights)), sum(weights.values())
    seen: Counter[str] = Counter()
    for window in range(2 * period + 3):
        [(dataset, number)] = located(mixed, window, 1)
        assert number == seen[dataset]  # in the dataset's own order, without a gap
        seen[dataset] += 1
        for name, weight in weights.items():
            assert abs(seen[name] * period - weight * (window + 1)) < period
        assert mixed.counts(window + 1).tolist() == [seen[name] for name in weights]


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**9), st.integers(0, 300))
def test_any_range_equals_window_by_window(weights: dict[str, int], first: int, count: int) -> None:
    mixed = MixedOrder(mix_of(weights))
    assert located(mixed, first, count) == [located(mixed, window, 1)[0] for window in range(first, first + count)]


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(NAMES, st.tuples(st.integers(1, 20), st.lists(st.integers(0, 120), max_size=20)), min_size=1),
    SEEDS, st.integers(1, 8), st.integers(0, 40),
)  # fmt: skip
def test_ranks_share_the_windows_that_a_naive_reading_takes(
    datasets: dict[str, tuple[int, list[int]]], seed: int, ranks: int, step: int
) -> None:
    """For any weights and shard sizes: datasets of a few windows wrap many times, those of many windows never."""
    mixed = MixedOrder(mix_of({dataset: weight for dataset, (weight, _) in datasets.items()}))
    orders = {dataset: WindowOrder([50, *sizes], 10, seed) for dataset, (_, sizes) in datasets.items()}
    share, seen = 3, Counter[str]()
    naive: list[tuple[str, int, int]] = []
    for window in range((step + 1) * ranks * share):
        [(dataset, _)] = located(mixed, window, 1)
        [(shard, own)] = pairs(orders[dataset], seen[dataset], 1)
        seen[dataset] += 1
        naive.append((dataset, shard, own))
    batch: list[tuple[str, int, int] | None] = []
    for rank in range(ranks):
        taken: list[tuple[str, int, int] | None] = [None] * share
        for dataset, start, places in mixed.parts((step * ranks + rank) * share, share):
            for place, (shard, own) in zip(places, pairs(orders[dataset], start, len(places)), strict=True):
                taken[place] = dataset, shard, own
        batch += taken
    assert batch == naive[-ranks * share :]


def test_the_schedule_stays_the_same_in_later_versions() -> None:
    """A change of these breaks the resume of every mixed run."""
    mixed = MixedOrder(mix_of({"a": 1, "b": 4, "c": 2}))
    assert "".join(dataset for dataset, _ in located(mixed, 0, 14)) == "bbcbabcbbcbabc"


def test_the_longest_period_is_scheduled_exactly() -> None:
    weights = parse_mix(["a:0.00001", "b:0.49999", "c:0.5"])
    assert MixedOrder(mix_of(weights)).counts(10**6).tolist() == [10, 499_990, 500_000]


@pytest.mark.parametrize(
    ("lines", "weights"),
    [
        ([], {}),
        (["web:0.8", "code:0.2"], {"code": 1, "web": 4}),
        (["web:8", "code:.2"], {"code": 1, "web": 40}),  # normalised
        (["a:1.", "b:1", "c:1"], {"a": 1, "b": 1, "c": 1}),
        (["a.b-c_d:2.50"], {"a.b-c_d": 1}),
        (["a:0.999999", "b:1.999998"], {"a": 1, "b": 2}),  # many digits, but a short period
    ],
)
def test_weights_become_the_smallest_whole_numbers(lines: list[str], weights: dict[str, int]) -> None:
    assert list(parse_mix(lines).items()) == list(weights.items())


@pytest.mark.parametrize(
    ("lines", "fact"),
    [
        (["web"], "'web'"),
        (["web:"], "'web:'"),
        ([":0.5"], "':0.5'"),
        (["web:-0.2"], "'web:-0.2'"),
        (["web:0"], "'web:0'"),
        (["web:0.00"], "'web:0.00'"),
        (["web:nan"], "'web:nan'"),
        (["web:1e999999999"], "'web:1e999999999'"),  # would take hours to compute
        (["web:1/3"], "'web:1/3'"),
        (["../x:1"], "'../x:1'"),
        (["mix:1"], "named 'mix'"),  # its val loss would have the key of their mean
        (["web:0.5", "web:0.5"], "'web' is named twice"),
        (["a:0.333333", "b:0.333333", "c:0.333334"], "fewer digits"),
        (["a:" + "9" * 4_000, "b:0." + "0" * 4_000 + "1"], "fewer digits"),
    ],
)
def test_a_mix_that_cannot_be_read_is_refused(lines: list[str], fact: str) -> None:
    with pytest.raises(ValueError, match=r"^train\.mix") as caught:
        parse_mix(lines)
    assert fact in str(caught.value)


def test_a_mix_is_described_and_averaged_by_weight() -> None:
    mix = mix_of({"code": 1, "web": 4})
    assert describe(mix) == "code 20 %, web 80 %"
    assert weighted_mean({"code": 2.0, "web": 3.0}, mix) == pytest.approx(2.8)
    assert weighted_mean({"web": 0.1 + 0.2}, mix_of({"web": 1})) == 0.1 + 0.2  # an unmixed loss is not rounded


@pytest.fixture
def datasets(config: RunConfig, build: BuildDataset) -> dict[str, Manifest]:
    """Three datasets of one store: two of them soon run out."""
    code, books = (build_other(config.store_url, *other) for other in (("code", range(100, 140)), ("books", range(55))))
    return {"small": build(config), "code": code, "books": books}


def test_a_mix_reads_each_dataset_in_its_own_order(
    store: Store, datasets: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffles: Counter[tuple[int, ...]] = Counter()
    shuffle = order._shuffled

    def counting(count: int, *seed: int) -> np.ndarray:
        shuffles[count, *seed] += 1
        return shuffle(count, *seed)

    monkeypatch.setattr(order, "_shuffled", counting)
    weights = {"books": 2, "code": 1, "small": 4}
    mix = {dataset: Share(datasets[dataset].digest, weight) for dataset, weight in weights.items()}
    mixed = MixedWindows(store, mix, "train", sequence_tokens=T, seed=7)
    count = 500
    read = np.concatenate([mixed.read(first, 50) for first in range(0, count, 50)])
    assert max(shuffles.values()) <= 2  # two datasets may have an equal shuffle; none is computed anew for each read
    alone = {
        dataset: Windows(store, dataset, version, "train", sequence_tokens=T, seed=7)
        for dataset, version in datasets.items()
    }
    expected = [alone[dataset].read(number, 1)[0] for dataset, number in located(mixed.order, 0, count)]
    assert np.array_equal(read, expected)
    assert np.array_equal(mixed.read(123, 200), expected[123:323])
    epochs = mixed.epochs(count)
    assert epochs["small"] > epochs["books"] > 1  # they have wrapped, each at its own pace
    counts = zip(mix, mixed.order.counts(count), strict=True)
    assert epochs == {name: n / alone[name].order.epoch_windows for name, n in counts}
    shards = {row.shard_id for version in datasets.values() for row in version.rows("train")}
    assert set(mixed.shards_of(0, 5_000)) == shards


def test_a_mix_of_one_dataset_is_that_dataset(store: Store, datasets: dict[str, Manifest]) -> None:
    version = datasets["small"]
    mixed = MixedWindows(store, {"small": Share(version.digest, 1)}, "train", sequence_tokens=T, seed=7)
    alone = Windows(store, "small", version, "train", sequence_tokens=T, seed=7)
    assert np.array_equal(mixed.read(100, 400), alone.read(100, 400))
