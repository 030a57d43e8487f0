"""A run is the same run for any number of ranks, micro-batch and prefetching, stopped and resumed or not.

10 steps of 16 windows wrap the epoch. The ranks are processes of a real gloo group.
"""

import hashlib
import random
from functools import cache
from itertools import product

import numpy as np
import pytest

from model.history import checkpoints
from model.loader import DataLoader
from model.order import WindowOrder
from tests.model.ranks import Asked, Seen, train
from tests.model.training import House, final_weights, history, losses

STEPS = 10
WINDOWS = 16
SETTINGS = (
    f"train.max_steps={STEPS}", "train.batch_tokens=512", "train.validate_every_steps=0",
    "train.checkpoint_every_steps=4",
)  # fmt: skip
SHAPES = [(ranks, micro, ahead) for ranks, micro, ahead in product((1, 2, 4), (1, 2, 4), (0, 4))]
FEW = [(1, 4, 0), (2, 2, 4), (4, 4, 4)]
EVERY = [shape if shape in FEW else pytest.param(*shape, marks=pytest.mark.full) for shape in SHAPES]


def words(micro: int, ahead: int) -> tuple[str, ...]:
    return (*SETTINGS, f"train.micro_batch_sequences={micro}", f"resources.prefetch_batches={ahead}")


@pytest.fixture(scope="module")
def whole(house: House) -> object:
    """What an undisturbed run of so many ranks took, and the name of the run."""

    @cache
    def trained(count: int) -> tuple[str, Seen]:
        run = f"elastic-{count}"
        return run, train(Asked(house.store.url, house.ask(run, *words(2, 0)), gradients=True), count)

    return trained


@pytest.fixture(scope="module")
def expected(house: House) -> dict[int, list[str]]:
    """The windows of every step, as the order has them, hashed."""
    config = house.config("any")
    loader = DataLoader(house.store, "small", house.manifest, "train", sequence_tokens=32, seed=config.train.seed)
    assert loader.order.epoch_windows < STEPS * WINDOWS
    return {
        step: [
            hashlib.sha256(window.astype("<i8").tobytes()).hexdigest()
            for window in loader.windows(step * WINDOWS, WINDOWS)
        ]
        for step in range(STEPS)
    }


@pytest.mark.parametrize(("count", "micro", "ahead"), EVERY)
def test_every_batch_is_the_orders_for_any_ranks_micro_batch_and_prefetching(
    house: House, expected: dict[int, list[str]], count: int, micro: int, ahead: int
) -> None:
    run = f"batches-{count}-{micro}-{ahead}"
    seen = train(Asked(house.store.url, house.ask(run, *words(micro, ahead))), count)
    assert seen.steps == expected


@pytest.mark.parametrize("draw", [0, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize(("count", "micro", "ahead"), FEW)
def test_stopped_at_three_random_steps_it_takes_the_same_batches(
    house: House, expected: dict[int, list[str]], whole: object, count: int, micro: int, ahead: int,
    draw: int,
) -> None:  # fmt: skip
    """And ends with the same weights, bit for bit, at 1 and 2 ranks."""
    run = f"stopped-{count}-{micro}-{ahead}-{draw}"
    asked = Asked(house.store.url, house.ask(run, *words(micro, ahead)))
    found: dict[int, list[str]] = {}
    for stop in [*sorted(random.Random(f"{run}").sample(range(STEPS - 1), 3)), None]:
        seen = train(asked._replace(stop_at=stop), count).steps
        assert not set(seen) & set(found), "a step was made twice"
        found |= seen
        if stop is not None:
            assert checkpoints(house.store, run)[-1].step == stop + 1
    assert found == expected
    calm, _ = whole(count)  # type: ignore[operator]
    if micro == 2 and count < 4:  # another micro-batch adds up in another order; so does a ring of four after a stop
        assert history(house.store, run) == history(house.store, calm)
        assert final_weights(house.store, run, STEPS) == final_weights(house.store, calm, STEPS)
    assert losses(house.store, run) == pytest.approx(losses(house.store, calm), rel=1e-4, abs=0)


def test_each_part_of_a_run_may_have_other_ranks_and_another_micro_batch(
    house: House, expected: dict[int, list[str]], whole: object
) -> None:
    found: dict[int, list[str]] = {}
    for count, micro, stop in [(4, 1, 2), (1, 4, 5), (2, 8, 7), (4, 4, None)]:
        key = house.ask("parts", *words(micro, 4))
        found |= train(Asked(house.store.url, key, stop), count).steps
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
