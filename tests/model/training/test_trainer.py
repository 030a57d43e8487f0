"""Training in real processes: it learns, ranks agree, and a damaged shard or a number that is none ends it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from model.__main__ import run_job
from model.checkpoints.records import WEIGHTS, checkpoints
from model.data.order import WindowOrder
from model.processes.distributed import DDPConfig
from model.runs.job import Job, read_job, read_result
from model.training.trainer import Trainer
from storage.keys import DatasetKeys, RunKeys
from storage.stores.store import read_json
from tests.model.training_runs import BATCH_TOKENS, SHORT, STEPS, House, flip_a_byte, history, losses, training

BATCH_WINDOWS = 8
REPAIR = "gpt2 dataset verify --repair"


# Learning


def test_the_loss_begins_at_that_of_a_guess_and_falls(house: House, undisturbed: Callable[[int], str]) -> None:
    found = losses(house.store, undisturbed(1))
    assert len(found) == STEPS
    assert 10.6 <= found[0] <= 11.1
    assert found[-1] < found[0] - 1
    assert all(later < earlier for earlier, later in pairwise(found))


def test_a_finished_training_answers_with_its_last_step(house: House, undisturbed: Callable[[int], str]) -> None:
    run = undisturbed(2)
    answered = read_result(house.store, read_job(house.store, house.ask(run))) or {}
    environment = answered.pop("environment")
    assert (environment["device"], environment["ranks"]) == ("cpu", 2)
    assert answered == {"step": STEPS, "tokens": STEPS * BATCH_TOKENS}
    assert [record.step for record in checkpoints(house.store, run)] == [4, 8, 12]
    assert (read_json(house.store, RunKeys(run).latest) or {})["step"] == STEPS
    assert [line["step"] for line in history(house.store, run) if "val_loss" in line] == [5, 11]


def test_losses_of_two_ranks_are_those_of_one(house: House, undisturbed: Callable[[int], str]) -> None:
    alone, shared = history(house.store, undisturbed(1)), history(house.store, undisturbed(2))
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=0)


def test_losses_are_the_same_for_another_micro_batch(house: House, undisturbed: Callable[[int], str]) -> None:
    run = house.trained_here("micro", "train.micro_batch_sequences=1")
    assert losses(house.store, run) == pytest.approx(losses(house.store, undisturbed(1)), rel=1e-5, abs=0)


# A damaged shard


def test_a_flipped_byte_in_a_shard_is_named_with_its_remedy(house: House, tmp_path: Path) -> None:
    copy = house.copy_without_runs(tmp_path / "store")
    key = copy.ask("spoilt")
    rows = list(copy.manifest.rows("train"))
    order = WindowOrder([row.tokens for row in rows], 32, copy.config("spoilt").train.seed)
    row = rows[int(order.locate(0, 1)[0][0])]
    before, after = flip_a_byte(copy.store, DatasetKeys("small").shard(row.shard_id))
    with training(copy.store, key, 1, tmp_path / "process") as process:
        assert process.wait() == 2, process.said()
        for said in (row.shard_id, before, after, REPAIR):
            assert said in process.errors()
        assert "Traceback" not in process.errors()
    assert not checkpoints(copy.store, "spoilt")


def test_a_flipped_byte_that_only_the_second_rank_reads_is_named_too(house: House, tmp_path: Path) -> None:
    copy = house.copy_without_runs(tmp_path / "store")
    rows = list(copy.manifest.rows("train"))
    for seed in range(1_000):
        order = WindowOrder([row.tokens for row in rows], 32, seed)
        first, second = (set(order.locate(at, BATCH_WINDOWS // 2)[0].tolist()) for at in (0, BATCH_WINDOWS // 2))
        if second - first:
            break
    row = rows[min(second - first)]
    before, after = flip_a_byte(copy.store, DatasetKeys("small").shard(row.shard_id))
    key = copy.ask("spoilt", f"train.seed={seed}")
    with training(copy.store, key, 2, tmp_path / "process") as process:
        assert process.wait() == 2, process.said()
        for said in (row.shard_id, before, after, REPAIR):
            assert said in process.errors()


# Numbers that are none


def test_a_gpu_that_is_too_small_is_named_with_the_setting_that_helps(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.27 GiB. GPU 0 has 8.00 GiB")

    monkeypatch.setattr(Trainer, "_train_step", full)
    assert run_job(house.store.url, house.ask("too-large", *SHORT)) == 2
    said = capsys.readouterr().err
    assert "CUDA out of memory" in said
    assert "train.micro_batch_sequences" in said
    assert "Traceback" not in said


def test_a_loss_that_is_no_number_stops_the_run(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    key = house.ask(
        "exploded", *SHORT, "train.learning_rate=1e30", "train.warmup_steps=0", "train.checkpoint_every_steps=1"
    )
    assert run_job(house.store.url, key) == 2
    assert "train.learning_rate" in capsys.readouterr().err
    newest = checkpoints(house.store, "exploded")[-1]
    body = house.store.read(RunKeys("exploded").checkpoint_file(newest.step, newest.attempt, WEIGHTS)).body
    assert all(tensor.isfinite().all() for tensor in load(bytes(body)).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_never_saved(house: House, value: float) -> None:
    run = f"poisoned-{value}"
    job: Job = read_job(house.store, house.ask(run))
    trainer = Trainer(house.store, job, DDPConfig(0, 1, torch.device("cpu")))
    with torch.no_grad():
        trainer.model.transformer.wte.weight[0] = value
    with pytest.raises(ValueError, match=run):
        trainer.fit()
    assert not checkpoints(house.store, run)
