"""A run takes the same batches for any number of ranks, micro-batch and prefetching, stopped and resumed or not.

10 steps of 16 windows wrap the epoch. The ranks are processes of a real gloo group.
"""

import random
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from storage.loading.order import WindowOrder
from storage.loading.windows import Windows
from tests.model.ranks import ObservedTraining, TrainingRequest, hashes, train
from tests.model.training_runs import StoredDataset, final_weights, history, losses

STEPS = 10
WINDOWS = 16
SETTINGS = (
    f"train.max_steps={STEPS}", "train.batch_tokens=512", "train.validate_every_steps=0",
    "train.checkpoint_every_steps=4",
)  # fmt: skip
EACH = list(product((1, 2, 4), (0, 4)))  # micro-batch sizes, and how many are prefetched


def settings_of(micro: int, ahead: int) -> tuple[str, ...]:
    return (*SETTINGS, f"train.micro_batch_sequences={micro}", f"resources.prefetch_batches={ahead}")


@pytest.fixture(scope="module")
def undisturbed_on(dataset: StoredDataset) -> object:
    """A function that trains an undisturbed run on this number of ranks. Returns its name and what it observed."""

    @cache
    def trained(count: int) -> tuple[str, ObservedTraining]:
        run = f"elastic-{count}"
        key = dataset.put_job(run, *settings_of(2, 0))
        return run, train([TrainingRequest(dataset.store.url, key, gradients=True)], count)[0]

    return trained


@pytest.fixture(scope="module")
def expected(dataset: StoredDataset) -> dict[int, list[str]]:
    """The hashes of every step's windows, from the window order."""
    seed = dataset.config("any").train.seed
    loader = Windows(dataset.store, "small", dataset.manifest, "train", sequence_tokens=32, seed=seed)
    assert loader.order.epoch_windows < STEPS * WINDOWS
    return {step: hashes(loader.read(step * WINDOWS, WINDOWS)) for step in range(STEPS)}


@pytest.mark.nightly
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_stopped_at_three_random_steps_takes_the_same_batches(
    dataset: StoredDataset, expected: dict[int, list[str]], undisturbed_on: object, count: int
) -> None:
    """For each micro-batch and prefetching. On 1 and 2 ranks the final weights are equal bit for bit."""
    runs = {f"stopped-{count}-{micro}-{ahead}": (micro, ahead) for micro, ahead in EACH}
    stops = {run: [*sorted(random.Random(run).sample(range(STEPS - 1), 3)), None] for run in runs}
    keys = {run: dataset.put_job(run, *settings_of(*shape)) for run, shape in runs.items()}
    requests = [TrainingRequest(dataset.store.url, keys[run], stop) for run in runs for stop in stops[run]]
    observed = iter(train(requests, count))
    reference, _ = undisturbed_on(count)  # type: ignore[operator]
    for run, (micro, _) in runs.items():
        windows_of_step: dict[int, list[str]] = {}
        for first, stop in pairwise([-1, *stops[run]]):
            steps = next(observed).steps
            assert set(steps) == set(range(first + 1, STEPS if stop is None else stop + 1))
            windows_of_step |= steps
        assert windows_of_step == expected
        if micro == 2 and count < 4:  # otherwise the order of summation differs: that of four ranks changes at a stop
            assert history(dataset.store, run) == history(dataset.store, reference)
            assert final_weights(dataset.store, run, STEPS) == final_weights(dataset.store, reference, STEPS)
        assert losses(dataset.store, run) == pytest.approx(losses(dataset.store, reference), rel=1e-4, abs=0)


@pytest.mark.full
def test_ranks_and_micro_batch_may_change_at_each_resume(
    dataset: StoredDataset, expected: dict[int, list[str]], undisturbed_on: object
) -> None:
    windows_of_step: dict[int, list[str]] = {}
    for count, micro, stop in [(4, 1, 2), (1, 4, 5), (2, 8, 7), (4, 4, None)]:
        key = dataset.put_job("parts", *settings_of(micro, 4))
        windows_of_step |= train([TrainingRequest(dataset.store.url, key, stop)], count)[0].steps
    assert windows_of_step == expected
    reference, _ = undisturbed_on(1)  # type: ignore[operator]
    assert losses(dataset.store, "parts") == pytest.approx(losses(dataset.store, reference), rel=1e-5, abs=0)


@pytest.mark.full
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_losses_and_gradients_equal_those_of_one_rank(
    dataset: StoredDataset, undisturbed_on: object, count: int
) -> None:
    (alone, single), (shared, many) = undisturbed_on(1), undisturbed_on(count)  # type: ignore[operator]
    assert losses(dataset.store, shared) == pytest.approx(losses(dataset.store, alone), rel=1e-5, abs=0)
    assert np.linalg.norm(many.gradients - single.gradients) <= 1e-6 * np.linalg.norm(single.gradients)


def test_eight_ranks_of_64_windows_stay_together_at_shard_borders() -> None:
    """10M-token shards, B = 64, T = 1,024: with one cursor per rank, rank 0 took 19 steps of a shard, the others 18."""
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
    expected = [
        pair
        for step in (0, 18, 19, 20, steps - 1)
        for pair in zip(*order.locate(step * per_step, per_step), strict=True)
    ]
    assert taken == expected
    assert len(set(taken)) == 5 * per_step
