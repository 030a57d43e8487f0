"""Checkpoints: a damaged or foreign one is refused by name, and the newest ones are kept."""

from collections.abc import Callable

import pytest
import torch

from model.__main__ import run_job
from model.checkpoints.records import OPTIMIZER, WEIGHTS, CheckpointRecord, checkpoints, retained
from model.config import TrainingConfig
from model.processes.distributed import DDPConfig
from model.runs.job import put_job, read_job
from model.runs.run import pin_run, training_job
from model.training.trainer import Trainer
from storage.errors import CheckpointInvalid
from storage.keys import RunKeys
from storage.stores.store import Store
from tests.damage import flip_bit
from tests.making import build_dataset
from tests.model.training_runs import SHORT, STEPS, StoredDataset, copy_checkpoints, losses, modification_times

# Damaged and foreign checkpoints


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("model.layers=2", ("model.layers is 1, not 2",)),
        ("train.learning_rate=2e-2", ("train.learning_rate is 0.01, not 0.02",)),
        ("train.seed=5", ("seed is 1337, not 5",)),
        ("data.dataset=other", ("dataset is 'small', not 'other'", "manifest is")),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    dataset: StoredDataset,
    undisturbed: Callable[[int], str],
    override: str,
    facts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, _, _ = override.partition("=")
    run = f"foreign-{name}"
    config = dataset.config(run, override)
    manifest = dataset.manifest
    if name == "data.dataset":
        manifest = build_dataset(dataset.config(run, override, "data.shard_tokens=900"))
    key = put_job(dataset.store, training_job(pin_run(dataset.store, config, manifest.digest, None)))
    copy_checkpoints(dataset.store, undisturbed(1), run)
    before = modification_times(dataset.store)
    assert run_job(dataset.store.url, key) == 2
    message = capsys.readouterr().err
    for fact in (run, "12", *facts):
        assert fact in message
    assert modification_times(dataset.store) == before


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
def test_a_damaged_checkpoint_is_named_and_the_remedy_works(
    dataset: StoredDataset, undisturbed: Callable[[int], str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"damaged-{file}"
    key = dataset.put_job(run)
    newest = copy_checkpoints(dataset.store, undisturbed(1), run, last_step=8)[-1]
    damaged = RunKeys(run).checkpoint_file(newest.step, newest.attempt, file)
    before, after = flip_bit(dataset.store, damaged)
    assert run_job(dataset.store.url, key) == 2
    message = capsys.readouterr().err
    for fact in (damaged, before, after, RunKeys(run).checkpoint_record(8)):
        assert fact in message
    dataset.store.delete(RunKeys(run).checkpoint_record(8))
    assert run_job(dataset.store.url, key) == 0
    assert losses(dataset.store, run) == pytest.approx(losses(dataset.store, undisturbed(1)), rel=1e-5, abs=0)


@pytest.mark.parametrize(("file", "damage"), [(WEIGHTS, "missing"), (OPTIMIZER, "cut")])
def test_a_checkpoint_with_incomplete_files_is_ignored_and_the_run_resumes(
    dataset: StoredDataset, undisturbed: Callable[[int], str], file: str, damage: str
) -> None:
    run = f"{damage}-{file}"
    key = dataset.put_job(run)
    newest = copy_checkpoints(dataset.store, undisturbed(1), run, last_step=8)[-1]
    path = dataset.store.local_path(RunKeys(run).checkpoint_file(newest.step, newest.attempt, file))
    assert path is not None
    body = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(body[:1_000])
    assert [record.step for record in checkpoints(dataset.store, run)] == [4]
    assert run_job(dataset.store.url, key) == 0
    assert losses(dataset.store, run) == pytest.approx(losses(dataset.store, undisturbed(1)), rel=1e-5, abs=0)


@pytest.mark.parametrize("keep_last", [3, 1])
def test_two_concurrent_trainings_of_a_run_do_not_mix(dataset: StoredDataset, keep_last: int) -> None:
    """The slower training fails at a step whose checkpoint exists; the faster one's objects stay, except progress."""
    key = dataset.put_job(f"twice-{keep_last}", *SHORT, f"train.keep_last={keep_last}", "train.keep_every_steps=0")
    slow = Trainer(dataset.store, read_job(dataset.store, key), DDPConfig(0, 1, torch.device("cpu")))
    assert run_job(dataset.store.url, key) == 0
    before = modification_times(dataset.store)
    with pytest.raises(CheckpointInvalid, match="twice"):
        slow.fit()
    assert [record.step for record in checkpoints(dataset.store, f"twice-{keep_last}")][-1] == STEPS
    after = modification_times(dataset.store)
    assert {name for name, at in before.items() if after.get(name) != at} <= {RunKeys(f"twice-{keep_last}").progress}
    assert all("/checkpoints/" in name or "/metrics/" in name for name in after.keys() - before.keys())


# Retention


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, 5, [5, 10, 11, 12]), (1, 0, [12]), (3, 12, [10, 11, 12]), (1, 4, [4, 8, 12]), (50, 0, list(range(1, 13)))],
)
def test_the_newest_checkpoints_and_the_multiples_are_kept(
    dataset: StoredDataset, keep_last: int, keep_every: int, kept: list[int]
) -> None:
    run = dataset.train(
        f"kept-{keep_last}-{keep_every}", f"train.keep_last={keep_last}", f"train.keep_every_steps={keep_every}",
        "train.checkpoint_every_steps=1", *SHORT,
    )  # fmt: skip
    assert [record.step for record in checkpoints(dataset.store, run)] == kept
    assert (
        len(list(dataset.store.list(RunKeys(run).checkpoints))) == len(kept) * 3
    )  # no file of a deleted checkpoint is left
    assert len(losses(dataset.store, run)) == STEPS  # the metrics of deleted checkpoints stay


def test_retention_always_leaves_a_checkpoint(dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run, key = ("always", dataset.put_job("always", "train.keep_last=1", "train.keep_every_steps=0", *SHORT))
    newest_steps: list[int] = []
    delete = type(dataset.store).delete

    def watched(store: Store, deleted: str) -> None:
        delete(store, deleted)  # type: ignore[arg-type]
        if deleted.startswith(RunKeys(run).checkpoints):
            newest_steps.append(checkpoints(store, run)[-1].step)

    monkeypatch.setattr(type(dataset.store), "delete", watched)
    assert run_job(dataset.store.url, key) == 0
    assert newest_steps == [8] * 3 + [12] * 3


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([250, 5_000, 5_250, 5_500, 5_750], [5_000, 5_500, 5_750]),
        ([4_750, 5_001, 5_250, 5_500, 5_750], [5_001, 5_500, 5_750]),  # delayed by the previous save
        ([5_001, 5_500, 10_400, 10_650, 10_900], [5_001, 10_400, 10_650, 10_900]),
        ([5_001, 16_000, 16_250], [5_001, 16_000, 16_250]),
        ([250, 500], [250, 500]),
    ],
)
def test_the_first_checkpoint_at_or_after_each_multiple_is_kept_forever(steps: list[int], kept: list[int]) -> None:
    records = [CheckpointRecord(step, "", {}, {}) for step in steps]
    train = TrainingConfig(keep_last=2)
    assert [record.step for record in retained(records, train)] == kept
    assert retained(retained(records, train), train) == retained(records, train)
    assert [record.step for record in retained(records, TrainingConfig(keep_last=2, keep_every_steps=0))] == steps[-2:]


@pytest.mark.parametrize(("losses", "best"), [([3, 1, 2, 4], 2), ([3, 2, 2, 4], 2), ([None, None, 5, None], 3)])
def test_the_checkpoint_with_the_lowest_val_loss_is_kept(losses: list[float | None], best: int) -> None:
    """The first of equals. It survives each retention on the way, as it must: deleted checkpoints do not come back."""
    kept: list[CheckpointRecord] = []
    for step, loss in enumerate(losses, 1):
        new = CheckpointRecord(step, "", {}, {}, val_loss=loss)
        kept = retained([*kept, new], TrainingConfig(keep_last=1))
    assert [record.step for record in kept] == [best, 4]
    assert [record.step for record in retained(kept, TrainingConfig(keep_last=1, keep_best=False))] == [4]
