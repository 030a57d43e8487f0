"""A run is the same run for any number of ranks, micro-batch and prefetching, stopped and resumed or not.

10 steps of 16 windows wrap the epoch. The ranks are processes of a real gloo group.
"""

import random
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from model.data.loader import DataLoader
from model.data.order import WindowOrder
from tests.model.ranks import Asked, Seen, hashes, train
from tests.model.training_runs import House, final_weights, history, losses

STEPS = 10
WINDOWS = 16
SETTINGS = (
    f"train.max_steps={STEPS}", "train.batch_tokens=512", "train.validate_every_steps=0",
    "train.checkpoint_every_steps=4",
)  # fmt: skip
COUNTS = [pytest.param(1, marks=pytest.mark.nightly), 2, pytest.param(4, marks=pytest.mark.nightly)]
EACH = list(product((1, 2, 4), (0, 4)))  # micro-batches, and how many of them are made ahead


def words(micro: int, ahead: int) -> tuple[str, ...]:
    return (*SETTINGS, f"train.micro_batch_sequences={micro}", f"resources.prefetch_batches={ahead}")


@pytest.fixture(scope="module")
def whole(house: House) -> object:
    """What an undisturbed run of so many ranks took, and the name of the run."""

    @cache
    def trained(count: int) -> tuple[str, Seen]:
        run = f"elastic-{count}"
        return run, train([Asked(house.store.url, house.ask(run, *words(2, 0)), gradients=True)], count)[0]

    return trained


@pytest.fixture(scope="module")
def expected(house: House) -> dict[int, list[str]]:
    """The windows of every step, as the order has them, hashed."""
    seed = house.config("any").train.seed
    loader = DataLoader(house.store, "small", house.manifest, "train", sequence_tokens=32, seed=seed)
    assert loader.order.epoch_windows < STEPS * WINDOWS
    return {step: hashes(loader.windows(step * WINDOWS, WINDOWS)) for step in range(STEPS)}


@pytest.mark.full
@pytest.mark.parametrize("count", COUNTS)
def test_stopped_at_three_random_steps_it_takes_the_same_batches(
    house: House, expected: dict[int, list[str]], whole: object, count: int
) -> None:
    """Twice for each micro-batch and prefetching. The weights are the same bit for bit at the end, at 1 and 2 ranks."""
    runs = {f"stopped-{count}-{micro}-{ahead}-{draw}": (micro, ahead) for micro, ahead in EACH for draw in (0, 1)}
    stops = {run: [*sorted(random.Random(run).sample(range(STEPS - 1), 3)), None] for run in runs}
    keys = {run: house.ask(run, *words(*shape)) for run, shape in runs.items()}
    taken = iter(train([Asked(house.store.url, keys[run], stop) for run in runs for stop in stops[run]], count))
    calm, _ = whole(count)  # type: ignore[operator]
    for run, (micro, _) in runs.items():
        found: dict[int, list[str]] = {}
        for first, stop in pairwise([-1, *stops[run]]):
            seen = next(taken).steps
            assert set(seen) == set(range(first + 1, STEPS if stop is None else stop + 1))
            found |= seen
        assert found == expected
        if micro == 2 and count < 4:  # else sums have another order: a ring of four's changes at a stop
            assert history(house.store, run) == history(house.store, calm)
            assert final_weights(house.store, run, STEPS) == final_weights(house.store, calm, STEPS)
        assert losses(house.store, run) == pytest.approx(losses(house.store, calm), rel=1e-4, abs=0)


@pytest.mark.full
def test_each_part_of_a_run_may_have_other_ranks_and_another_micro_batch(
    house: House, expected: dict[int, list[str]], whole: object
) -> None:
    found: dict[int, list[str]] = {}
    for count, micro, stop in [(4, 1, 2), (1, 4, 5), (2, 8, 7), (4, 4, None)]:
        key = house.ask("parts", *words(micro, 4))
        found |= train([Asked(house.store.url, key, stop)], count)[0].steps
    assert found == expected
    calm, _ = whole(1)  # type: ignore[operator]
    assert losses(house.store, "parts") == pytest.approx(losses(house.store, calm), rel=1e-5, abs=0)


@pytest.mark.parametrize("count", [2, 4])
def test_losses_and_gradients_are_those_of_one_rank(house: House, whole: object, count: int) -> None:
    (alone, one), (shared, many) = whole(1), whole(count)  # type: ignore[operator]
    assert losses(house.store, shared) == pytest.approx(losses(house.store, alone), rel=1e-5, abs=0)
    assert np.linalg.norm(many.gradients - one.gradients) <= 1e-6 * np.linalg.norm(one.gradients)


def test_eight_ranks_of_64_windows_never_part_at_the_border_of_a_shard() -> None:
    """10M-token shards, B = 64, T = 1,024: with cursors of their own rank 0 took 19 steps of a shard, the others 18."""
    order = WindowOrder([10_000_000] * 20 + [2_590_278, 1], 1_024, 1337)
    per_step = 64 * 8
    assert order.epoch_windows == 20 * 9_765 + 2_529
    steps = order.epoch_windows // per_step
    taken = [
        pair
        for step in (0, 18, 19, 20, steps - 1)
        for rank in range(8)
        for pair in zip(*order.locate(step * per_step + rank * 64, 64), strict=True)
    ]
    whole = [
        pair
        for step in (0, 18, 19, 20, steps - 1)
        for pair in zip(*order.locate(step * per_step, per_step), strict=True)
    ]
    assert taken == whole
    assert len(set(taken)) == 5 * per_step
