"""Checkpoints: one that is damaged or of something else is named, and the newest are kept."""

from collections.abc import Callable

import pytest
import torch

from model.__main__ import run_job
from model.checkpoints.records import OPTIMIZER, WEIGHTS, CheckpointRecord, checkpoints, retained
from model.processes.distributed import DDPConfig
from model.runs.job import put_job, read_job
from model.runs.run import pin_run, training_job
from model.training.trainer import Trainer
from storage.errors import CheckpointInvalid
from storage.keys import RunKeys
from storage.stores.store import Store
from tests.making import build_dataset
from tests.model.training_runs import SHORT, STEPS, House, copy_checkpoints, everything, flip_a_byte, losses

# What is damaged or does not belong


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.layers=2", ("model.layers is 1, not 2",)),
        ("train.learning_rate=2e-2", ("train.learning_rate is 0.01, not 0.02",)),
        ("train.seed=5", ("seed is 1337, not 5",)),
        ("data.dataset=other", ("dataset is 'small', not 'other'", "manifest is")),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    house: House,
    undisturbed: Callable[[int], str],
    override: str,
    said: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, _, _ = override.partition("=")
    run = f"foreign-{name}"
    config = house.config(run, override)
    manifest = house.manifest
    if name == "data.dataset":
        manifest = build_dataset(house.config(run, override, "data.shard_tokens=900"))
    key = put_job(house.store, training_job(pin_run(house.store, config, manifest.digest, None)))
    copy_checkpoints(house.store, undisturbed(1), run)
    before = everything(house.store)
    assert run_job(house.store.url, key) == 2
    message = capsys.readouterr().err
    for word in (run, "12", *said):
        assert word in message
    assert everything(house.store) == before


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
def test_a_damaged_checkpoint_is_named_and_the_remedy_works(
    house: House, undisturbed: Callable[[int], str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"damaged-{file}"
    key = house.ask(run)
    newest = copy_checkpoints(house.store, undisturbed(1), run, last_step=8)[-1]
    damaged = RunKeys(run).checkpoint_file(newest.step, newest.attempt, file)
    before, after = flip_a_byte(house.store, damaged)
    assert run_job(house.store.url, key) == 2
    message = capsys.readouterr().err
    for said in (damaged, before, after, RunKeys(run).checkpoint_record(8)):
        assert said in message
    house.store.delete(RunKeys(run).checkpoint_record(8))
    assert run_job(house.store.url, key) == 0
    assert losses(house.store, run) == pytest.approx(losses(house.store, undisturbed(1)), rel=1e-5, abs=0)


@pytest.mark.parametrize(("file", "harm"), [(WEIGHTS, "missing"), (OPTIMIZER, "cut")])
def test_a_record_without_its_whole_files_does_not_count_and_the_run_goes_on(
    house: House, undisturbed: Callable[[int], str], file: str, harm: str
) -> None:
    run = f"{harm}-{file}"
    key = house.ask(run)
    newest = copy_checkpoints(house.store, undisturbed(1), run, last_step=8)[-1]
    path = house.store.local_path(RunKeys(run).checkpoint_file(newest.step, newest.attempt, file))
    assert path is not None
    body = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(body[:1_000])
    assert [record.step for record in checkpoints(house.store, run)] == [4]
    assert run_job(house.store.url, key) == 0
    assert losses(house.store, run) == pytest.approx(losses(house.store, undisturbed(1)), rel=1e-5, abs=0)


def test_two_trainings_of_one_run_do_not_mix(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The slower one is told so at its next save, and the faster one's checkpoints stay."""
    key = house.ask("twice", *SHORT)
    slow = Trainer(house.store, read_job(house.store, key), DDPConfig(0, 1, torch.device("cpu")))
    assert run_job(house.store.url, key) == 0
    before = everything(house.store)
    with pytest.raises(CheckpointInvalid, match="twice"):
        slow.fit()
    kept = {name: at for name, at in everything(house.store).items() if name in before and "/checkpoints/" in name}
    assert kept == {name: at for name, at in before.items() if "/checkpoints/" in name}


# Retention


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, 5, [5, 10, 11, 12]), (1, 0, [12]), (3, 12, [10, 11, 12]), (1, 4, [4, 8, 12]), (50, 0, list(range(1, 13)))],
)
def test_the_newest_and_the_multiples_are_kept(house: House, keep_last: int, keep_every: int, kept: list[int]) -> None:
    run = house.trained_here(
        f"kept-{keep_last}-{keep_every}", f"train.keep_last={keep_last}", f"train.keep_every_steps={keep_every}",
        "train.checkpoint_every_steps=1", *SHORT,
    )  # fmt: skip
    assert [record.step for record in checkpoints(house.store, run)] == kept
    assert len(list(house.store.list(RunKeys(run).checkpoints))) == len(kept) * 3  # nothing of the others is left
    assert len(losses(house.store, run)) == STEPS  # but their metrics are


def test_there_is_a_checkpoint_at_every_moment_of_a_retention(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    run, key = "always", house.ask("always", "train.keep_last=1", "train.keep_every_steps=0", *SHORT)
    found: list[int] = []
    delete = type(house.store).delete

    def watched(store: Store, deleted: str) -> None:
        delete(store, deleted)  # type: ignore[arg-type]
        if deleted.startswith(RunKeys(run).checkpoints):
            found.append(checkpoints(store, run)[-1].step)

    monkeypatch.setattr(type(house.store), "delete", watched)
    assert run_job(house.store.url, key) == 0
    assert found == [8] * 3 + [12] * 3


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        ([250, 5_000, 5_250, 5_500, 5_750], [5_000, 5_500, 5_750]),
        ([4_750, 5_001, 5_250, 5_500, 5_750], [5_001, 5_500, 5_750]),  # it had to wait for the one before
        ([5_001, 5_500, 10_400, 10_650, 10_900], [5_001, 10_400, 10_650, 10_900]),
        ([5_001, 16_000, 16_250], [5_001, 16_000, 16_250]),
        ([250, 500], [250, 500]),
    ],
)
def test_the_first_at_or_after_each_multiple_is_kept_for_good(there: list[int], kept: list[int]) -> None:
    records = [CheckpointRecord(step, "", {}, {}) for step in there]
    assert [record.step for record in retained(records, 2, 5_000)] == kept
    assert retained(retained(records, 2, 5_000), 2, 5_000) == retained(records, 2, 5_000)
    assert [record.step for record in retained(records, 2, 0)] == there[-2:]
