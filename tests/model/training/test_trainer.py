"""Training in real processes: the loss falls, ranks agree, and a damaged shard or NaN ends it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from model.__main__ import run_job
from model.checkpoints.records import WEIGHTS, checkpoints
from model.processes.distributed import DDPConfig
from model.runs.job import Job, read_job, read_result
from model.training.trainer import Trainer
from storage.keys import DatasetKeys, RunKeys
from storage.loading.order import WindowOrder
from tests.damage import flip_bit
from tests.model.training_runs import BATCH_TOKENS, SHORT, STEPS, StoredDataset, history, losses, training

BATCH_WINDOWS = 8
REPAIR = "gpt2 dataset verify --repair"


# Learning


def test_the_loss_starts_at_a_uniform_guess_and_falls(
    dataset: StoredDataset, undisturbed: Callable[[int], str]
) -> None:
    run_losses = losses(dataset.store, undisturbed(1))
    assert len(run_losses) == STEPS
    assert 10.6 <= run_losses[0] <= 11.1
    assert run_losses[-1] < run_losses[0] - 1
    assert all(later < earlier for earlier, later in pairwise(run_losses))


@pytest.mark.full
def test_the_result_of_a_training_holds_its_last_step(
    dataset: StoredDataset, undisturbed: Callable[[int], str]
) -> None:
    run = undisturbed(2)
    result = read_result(dataset.store, read_job(dataset.store, dataset.put_job(run))) or {}
    environment = result.pop("environment")
    assert (environment["device"], environment["ranks"]) == ("cpu", 2)
    assert result == {"step": STEPS, "tokens": STEPS * BATCH_TOKENS}
    assert [record.step for record in checkpoints(dataset.store, run)] == [4, 8, 12]
    assert [line["step"] for line in history(dataset.store, run) if "val_loss" in line] == [5, 11]


def test_losses_of_two_ranks_equal_those_of_one(dataset: StoredDataset, undisturbed: Callable[[int], str]) -> None:
    alone, shared = history(dataset.store, undisturbed(1)), history(dataset.store, undisturbed(2))
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=0)


def test_losses_are_the_same_for_another_micro_batch(dataset: StoredDataset, undisturbed: Callable[[int], str]) -> None:
    run = dataset.train("micro", "train.micro_batch_sequences=1")
    assert losses(dataset.store, run) == pytest.approx(losses(dataset.store, undisturbed(1)), rel=1e-5, abs=0)


# A damaged shard


def test_a_flipped_byte_in_a_shard_is_named_with_its_remedy(dataset: StoredDataset, tmp_path: Path) -> None:
    copy = dataset.copy_without_runs(tmp_path / "store")
    key = copy.put_job("damaged")
    rows = list(copy.manifest.rows("train"))
    order = WindowOrder([row.tokens for row in rows], 32, copy.config("damaged").train.seed)
    row = rows[int(order.locate(0, 1)[0][0])]
    before, after = flip_bit(copy.store, DatasetKeys("small").shard(row.shard_id))
    with training(copy.store, key, 1, tmp_path / "process") as process:
        assert process.wait() == 2, process.output()
        for fact in (row.shard_id, before, after, REPAIR):
            assert fact in process.errors()
        assert "Traceback" not in process.errors()
    assert not checkpoints(copy.store, "damaged")


@pytest.mark.full
def test_a_flipped_byte_that_only_the_second_rank_reads_is_named_too(dataset: StoredDataset, tmp_path: Path) -> None:
    copy = dataset.copy_without_runs(tmp_path / "store")
    rows = list(copy.manifest.rows("train"))
    for seed in range(1_000):
        order = WindowOrder([row.tokens for row in rows], 32, seed)
        first, second = (set(order.locate(at, BATCH_WINDOWS // 2)[0].tolist()) for at in (0, BATCH_WINDOWS // 2))
        if second - first:
            break
    row = rows[min(second - first)]
    before, after = flip_bit(copy.store, DatasetKeys("small").shard(row.shard_id))
    key = copy.put_job("damaged", f"train.seed={seed}")
    with training(copy.store, key, 2, tmp_path / "process") as process:
        assert process.wait() == 2, process.output()
        for fact in (row.shard_id, before, after, REPAIR):
            assert fact in process.errors()


# Out of memory, NaN and infinity


def test_a_gpu_that_is_too_small_is_named_with_the_setting_that_helps(
    dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.27 GiB. GPU 0 has 8.00 GiB")

    monkeypatch.setattr(Trainer, "_train_step", full)
    assert run_job(dataset.store.url, dataset.put_job("too-large", *SHORT)) == 2
    error = capsys.readouterr().err
    assert "CUDA out of memory" in error
    assert "train.micro_batch_sequences" in error
    assert "Traceback" not in error


def test_a_nan_loss_stops_the_run(dataset: StoredDataset, capsys: pytest.CaptureFixture[str]) -> None:
    key = dataset.put_job(
        "exploded", *SHORT, "train.learning_rate=1e15", "train.warmup_steps=0", "train.checkpoint_every_steps=1"
    )
    assert run_job(dataset.store.url, key) == 2
    assert "train.learning_rate" in capsys.readouterr().err
    newest = checkpoints(dataset.store, "exploded")[-1]
    body = dataset.store.read(RunKeys("exploded").checkpoint_file(newest.step, newest.attempt, WEIGHTS)).body
    assert all(tensor.isfinite().all() for tensor in load(bytes(body)).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_never_saved(dataset: StoredDataset, value: float) -> None:
    run = f"poisoned-{value}"
    job: Job = read_job(dataset.store, dataset.put_job(run))
    trainer = Trainer(dataset.store, job, DDPConfig(0, 1, torch.device("cpu")))
    with torch.no_grad():
        trainer.model.transformer.wte.weight[0] = value
    with pytest.raises(ValueError, match=run):
        trainer.fit()
    assert not checkpoints(dataset.store, run)
