"""The automatic micro-batch: a fixed size for short runs, measured once for long ones, halved when memory runs out."""

from collections import Counter
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.inspection.garbage import collect
from model.config import TrainingConfig
from model.config_file import load_config
from model.evaluation.evaluator import Evaluator
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.runs.job import read_job
from model.training import micro_batch
from model.training.micro_batch import MEASURE_SECONDS, Speed, choose_sequences, put_speed, read_speed
from model.training.trainer import Trainer
from storage import keys
from storage.digests import canonical_json, digest
from storage.errors import ObjectCorrupt
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests.model.ranks import SoloRank, TrainingRequest, train
from tests.model.training_runs import STEPS, StoredDataset, assert_equal_runs, losses

AUTOMATIC = "train.micro_batch_sequences=0"
LONG = "train.max_steps=100_000_000"
SETUP: dict[str, Any] = {"batch_tokens": 65_536, "sequence_tokens": 32, "ranks": 1}  # 2,048 windows


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), create=True)


def choose(store: Store, *overrides: str, ranks: int = 1, setup: dict[str, Any] = SETUP) -> int:
    """The size for 2,048 windows of 32 tokens."""
    shape = ("model.layers=1", "model.heads=1", "model.width=8", "model.context_tokens=1024")
    short = ("train.sequence_tokens=32", "train.batch_tokens=65536", "train.max_steps=9", "train.warmup_steps=0")
    config = load_config(None, [*shape, *short, *overrides])
    evaluator = Evaluator(GPT(config.model), SoloRank(0, ranks, torch.device("cpu")))
    return choose_sequences(store, evaluator, config.train, setup)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], Counter[int]]:
    """A function that replaces the passes by given seconds for each size. Returns how often each size is measured."""

    def replaced(seconds: Callable[[int], float]) -> Counter[int]:
        passes = Counter[int]()

        def timed(_: Evaluator, size: int, _tokens: int) -> float:
            passes[size] += 1
            return seconds(size)

        monkeypatch.setattr(micro_batch, "_seconds", timed)
        return passes

    return replaced


Measured = Callable[[Callable[[int], float]], Counter[int]]

# A short run


@pytest.mark.parametrize(
    ("overrides", "ranks", "size"),
    [
        ([], 1, 32),
        (["train.batch_tokens=128"], 1, 4),
        (["train.batch_tokens=384"], 1, 4),  # 12 windows: the largest power of two that divides them
        (["train.batch_tokens=384"], 4, 1),
        (["train.sequence_tokens=1024"], 1, 1),
        (["train.sequence_tokens=20", "train.batch_tokens=20480"], 1, 32),  # 51 windows have 1,024 tokens
    ],
)
def test_a_short_run_has_a_fixed_size_and_measures_nothing(
    store: Store, measured: Measured, overrides: list[str], ranks: int, size: int
) -> None:
    passes = measured(lambda _: 0.1)
    assert choose(store, *overrides, ranks=ranks) == size
    assert not passes
    assert not list(store.list("speeds/"))


def test_the_demo_has_the_micro_batch_of_two_that_it_was_made_with(store: Store) -> None:
    config = load_config(Path("demo"), [])
    evaluator = Evaluator(GPT(config.model), SoloRank(0, config.resources.processes, torch.device("cpu")))
    assert config.train.micro_batch_sequences == 0
    assert choose_sequences(store, evaluator, config.train, SETUP) == 2


# A long run


def test_a_long_run_takes_the_fastest_size_and_remembers_it(store: Store, measured: Measured) -> None:
    passes = measured(lambda size: 1e-3 * size + 1e-2 + 1e-6 * size**2)  # per sequence, fastest at 100
    assert choose(store, LONG) == 128
    assert passes == dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128), micro_batch.REPETITIONS)
    speed = read_speed(store, SETUP)
    assert speed is not None
    seconds, memory_bytes = speed.timings[128]
    assert (speed.sequences, speed.tokens_per_second) == (128, pytest.approx(128 * 32 / seconds))
    assert memory_bytes > 0
    assert choose(store, LONG) == 128
    assert passes.total() == 8 * micro_batch.REPETITIONS
    assert choose(store, LONG, setup=SETUP | {"torch": "3.0"}) == 128
    assert passes.total() == 16 * micro_batch.REPETITIONS
    assert not [item for item in collect(store, -3_600, remove=False) if item.name.startswith("speeds/")]


def test_a_few_lucky_or_slow_passes_decide_nothing(store: Store, measured: Measured) -> None:
    """As on a shared host, and where the first pass of each size is compiled."""
    passes = measured(
        lambda size: (
            (1e-3 * size + 1e-2) * (9 if passes[size] <= 1 else 0.1 if size < 8 and passes[size] in (2, 5) else 1)
        )
    )
    assert choose(store, LONG) == 128


def test_a_short_run_ends_with_the_size_that_it_began_with(store: Store, measured: Measured) -> None:
    """It may resume after a long run has measured. Only a size at which memory ran out is lowered."""
    measured(lambda size: 1e-3 * size + 1e-3 * (size - 8) ** 2)
    assert (choose(store), choose(store, LONG), choose(store)) == (32, 8, 32)
    put_speed(store, Speed(SETUP, 16), overwrite)
    assert choose(store) == 16


def test_of_two_processes_that_measure_at_once_both_use_the_first_result(store: Store, measured: Measured) -> None:
    def seconds(size: int) -> float:
        put_speed(store, Speed(SETUP, 8))  # by the other process, which has finished meanwhile
        return 1e-3 * size + 1e-2

    measured(seconds)
    assert choose(store, LONG) == 8


@pytest.mark.parametrize("fitting", [0, 1])
def test_sizes_from_one_that_does_not_fit_are_left_out(store: Store, measured: Measured, fitting: int) -> None:
    """Even if it fitted once: the first pass has no gradients yet."""
    passes = measured(lambda size: 1e-3 * size + 1e-2 if size <= 16 or passes[32] <= fitting else inf)
    assert choose(store, LONG) == 16
    assert passes[32] == fitting + 1
    assert (passes[8], passes[64]) == (micro_batch.REPETITIONS, fitting)


def test_measuring_ends_in_time(store: Store, measured: Measured) -> None:
    """Ten rounds of the 8 sizes would take 134 s."""
    passes = measured(lambda size: 0.25 * size * 0.9 ** (size / 4))
    assert choose(store, LONG) == max(passes)
    assert sum(0.25 * size * 0.9 ** (size / 4) * count for size, count in passes.items()) <= MEASURE_SECONDS
    assert max(passes) >= 8


def test_a_slow_clock_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass per size takes 8 s by this clock, which advances at each look."""
    now = iter(range(0, 1_000_000, 8))
    monkeypatch.setattr(micro_batch.time, "perf_counter", lambda: float(next(now)))
    choose(store, LONG)
    assert next(now) <= 8 * 2 * 4


@pytest.mark.parametrize("record", [{}, {"setup": {}, "sequences": 4}, {"setup": SETUP, "sequences": 3}])
def test_a_damaged_record_is_refused_by_its_key(store: Store, record: dict[str, Any]) -> None:
    """2,048 windows are not a whole number of micro-batches of 3."""
    key = keys.speed(digest(SETUP))
    store.put_new(key, canonical_json(record))
    with pytest.raises(ObjectCorrupt, match=rf"{key}.*Delete it"):
        choose(store, LONG)


# Training with it


def test_measuring_changes_neither_weights_nor_batches(
    dataset: StoredDataset, undisturbed: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(micro_batch.PEAK_FLOPS, "cpu", 1.0)  # so the run counts as long
    job = read_job(dataset.store, dataset.put_job("measured", AUTOMATIC))
    trainer = Trainer(dataset.store, job, DDPConfig(0, 1, torch.device("cpu")))
    assert all(weight.grad is None for weight in trainer.model.parameters())
    speed = read_speed(dataset.store, trainer.setup)
    assert speed is not None
    assert speed.timings
    measured = dataset.train("measured", AUTOMATIC)
    assert losses(dataset.store, measured) == pytest.approx(losses(dataset.store, undisturbed(1)), rel=1e-5, abs=0)
    dataset.train("explicit", f"train.micro_batch_sequences={speed.sequences}")
    assert_equal_runs(dataset.store, measured, "explicit")


def test_two_ranks_agree_on_a_measured_size(dataset: StoredDataset) -> None:
    """With DDP, ranks of different sizes would not take part in the same sums of gradients, and would not end."""
    key = dataset.put_job("long-2", AUTOMATIC, LONG)
    before = {listed.key for listed in dataset.store.list("speeds/")}
    [observed] = train([TrainingRequest(dataset.store.url, key, stop_at=2)], 2)
    assert set(observed.steps) == {0, 1, 2}
    assert len({listed.key for listed in dataset.store.list("speeds/")} - before) == 1


# Out of memory


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A function that makes memory run out in training passes of more than `most` sequences, after some passes."""
    forward = GPT.forward

    def limited(most: int, after: int) -> None:
        passes = 0

        def pass_or_fail(self: GPT, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
            nonlocal passes
            passes += 1
            if self.training and len(tokens_BT) > most and passes > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.27 GiB")
            return forward(self, tokens_BT, targets_BT)

        monkeypatch.setattr(GPT, "forward", pass_or_fail)

    return limited


def test_out_of_memory_halves_the_size_and_repeats_the_step(
    dataset: StoredDataset, small_memory: Callable[[int, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    dropped = ("train.dropout=0.25",)
    dataset.train("halved-before", "train.micro_batch_sequences=2", *dropped)
    small_memory(2, 0)
    dataset.train("halved", AUTOMATIC, *dropped)
    assert_equal_runs(dataset.store, "halved", "halved-before")
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if "memory ran out" in line] == [
        "step 1: memory ran out with 8 sequences per micro-batch; going on with 4",
        "step 1: memory ran out with 4 sequences per micro-batch; going on with 2",
    ]
    dataset.train("halved-again", AUTOMATIC, *dropped)
    assert "memory ran out" not in capsys.readouterr().out
    assert_equal_runs(dataset.store, "halved-again", "halved")


def test_out_of_memory_in_the_middle_of_a_run_changes_no_batch(
    dataset: StoredDataset, undisturbed: Callable[[int], str], small_memory: Callable[[int, int], None]
) -> None:
    small_memory(4, STEPS // 2)
    run = dataset.train("halved-later", AUTOMATIC, "train.batch_tokens=256")
    assert losses(dataset.store, run) == pytest.approx(losses(dataset.store, undisturbed(1)), rel=1e-5, abs=0)


def test_one_of_several_ranks_ends_with_an_error_and_the_next_start_uses_half(dataset: StoredDataset) -> None:
    job = read_job(dataset.store, dataset.put_job("one-of-two", AUTOMATIC, "train.dropout=0.3"))
    trainer = Trainer(dataset.store, job, DDPConfig(0, 1, torch.device("cpu")))
    trainer.ddp = SoloRank(1, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"memory ran out with 8 .*Run the same command again: it resumes with 4"):
        trainer._halve_micro_batch()
    assert Trainer(dataset.store, job, DDPConfig(0, 1, torch.device("cpu"))).sequences == 4


def test_a_size_that_was_set_is_never_halved(dataset: StoredDataset, small_memory: Callable[[int, int], None]) -> None:
    job = read_job(dataset.store, dataset.put_job("set", "train.micro_batch_sequences=4"))
    small_memory(2, 0)
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(dataset.store, job, DDPConfig(0, 1, torch.device("cpu"))).fit()
    assert TrainingConfig().micro_batch_sequences == 0
