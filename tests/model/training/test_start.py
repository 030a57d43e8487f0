"""The start of a training: from another run's checkpoint on request, and never with invalid settings."""

import re
from dataclasses import replace

import pytest

from model.__main__ import run_job
from model.checkpoints.records import (
    WEIGHTS,
    checkpoints,
    chosen,
    put_checkpoint,
    read_checkpoint_file,
    read_metrics,
)
from model.config_file import load_config
from model.runs.run import Start, find_run, pin_run, pinned_run, training_job
from storage.errors import DatasetMismatch, ObjectMissing
from storage.keys import RunKeys
from tests.model.training_runs import SHORT, STEPS, StoredDataset, final_weights, history, losses

# From another run


def test_a_run_started_with_everything_of_another_continues_like_it(dataset: StoredDataset) -> None:
    whole = dataset.train("whole", *SHORT)
    dataset.train("half", *SHORT, "train.checkpoint_every_steps=6", "train.keep_last=9")
    at_six = next(record for record in checkpoints(dataset.store, "half") if record.step == 6)
    for record in checkpoints(dataset.store, "half"):
        if record.step > 6:
            dataset.store.delete(RunKeys("half").checkpoint_record(record.step))
    branch = dataset.train("branch", *SHORT, "train.start_from=half", "train.start_with=everything")
    assert find_run(dataset.store, branch).start == Start("half", 6, at_six.attempt)
    assert losses_from(dataset, branch, 6) == losses(dataset.store, whole)[6:]
    assert final_weights(dataset.store, branch) == final_weights(dataset.store, whole)


def losses_from(dataset: StoredDataset, run: str, step: int) -> list[float]:
    """The losses of a run whose metrics begin at this step."""
    lines = read_metrics(dataset.store, run)
    assert [line.step for line in lines] == list(range(step, STEPS))
    return [line.loss for line in lines]


def test_a_run_started_with_weights_begins_its_own_schedule(dataset: StoredDataset) -> None:
    taught = dataset.train("taught", *SHORT)
    run = dataset.train("pupil", *SHORT, "train.start_from=taught", "train.seed=5")
    lines = history(dataset.store, run)
    assert lines[0]["step"] == 0
    assert lines[0]["learning_rate"] == history(dataset.store, taught)[0]["learning_rate"]
    assert lines[0]["loss"] < losses(dataset.store, taught)[0] - 1
    assert lines[0]["loss"] == pytest.approx(losses(dataset.store, taught)[-1], abs=0.3)


def test_another_schedule_under_the_same_name_is_refused_with_a_remedy(dataset: StoredDataset) -> None:
    dataset.train("fixed", *SHORT)
    with pytest.raises(DatasetMismatch) as caught:
        pinned_run(dataset.store, dataset.config("fixed", *SHORT, "train.max_steps=99"))
    for fact in ("train.max_steps is 12, not 99", "gpt2 train NEW --extend fixed"):
        assert fact in str(caught.value)


def test_settings_outside_the_recipe_may_change_and_keep_the_job(dataset: StoredDataset) -> None:
    run = pin_run(dataset.store, dataset.config("same", *SHORT), dataset.manifest.digest, None)
    how = ("train.micro_batch_sequences=1", "train.compile=off", "train.keep_last=9", "train.checkpoint_every_steps=2")
    other = dataset.config("same", *SHORT, *how, "train.keep_every_steps=7")
    again = pinned_run(dataset.store, other)
    assert again == run
    assert again is not None
    assert training_job(again).job_id == training_job(run).job_id
    assert training_job(again).how.train["micro_batch_sequences"] == 1


@pytest.mark.parametrize("parent", ["nobody", "unsaved"])
def test_a_start_from_a_run_without_a_checkpoint_is_refused(dataset: StoredDataset, parent: str) -> None:
    if parent == "unsaved":
        dataset.put_job(parent)
    with pytest.raises(ObjectMissing, match=r"train\.start_from") as caught:
        dataset.put_job("child", f"train.start_from={parent}")
    assert parent in str(caught.value)
    assert "gpt2 import" in str(caught.value)


def test_a_start_checkpoint_that_was_deleted_is_named(
    dataset: StoredDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.train("fleeting", *SHORT)
    key = dataset.put_job("late", *SHORT, "train.start_from=fleeting")
    dataset.store.delete(RunKeys("fleeting").checkpoint_record(STEPS))
    assert run_job(dataset.store.url, key) == 2
    error = capsys.readouterr().err
    assert "'fleeting'" in error
    assert f"step {STEPS}" in error


@pytest.mark.parametrize(("parent", "reason"), [("over", f"{STEPS}, so no steps"), ("weights-only", "only weights")])
def test_everything_of_a_run_that_cannot_go_on_is_refused_before_the_run_is_pinned(
    dataset: StoredDataset, parent: str, reason: str
) -> None:
    dataset.train("over", *SHORT)
    if parent == "weights-only":
        newest = chosen(dataset.store, "over")[0]
        weights = {WEIGHTS: read_checkpoint_file(dataset.store, "over", newest, WEIGHTS)}
        put_checkpoint(dataset.store, parent, weights, replace(newest, step=0, attempt="1"))
    with pytest.raises(ValueError, match=reason):
        dataset.put_job("more", *SHORT, f"train.start_from={parent}", "train.start_with=everything")
    assert find_run(dataset.store, "more") is None


@pytest.mark.parametrize("setting", ["model.width=32", "model.heads=4", "model.context_tokens=64"])
def test_a_start_from_another_shape_is_refused_before_the_run_is_pinned(dataset: StoredDataset, setting: str) -> None:
    dataset.train("small", *SHORT, "train.max_steps=2")
    name, _, value = setting.partition("=")
    with pytest.raises(DatasetMismatch, match=rf"train\.start_from = 'small'.*{name} is \d+, not {value}\."):
        dataset.put_job("another-shape", *SHORT, "train.start_from=small", setting)
    assert find_run(dataset.store, "another-shape") is None


# Invalid settings


def test_a_dataset_smaller_than_one_batch_is_refused(
    dataset: StoredDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    key = dataset.put_job("huge", "train.batch_tokens=65536")
    assert run_job(dataset.store.url, key) == 2
    error = capsys.readouterr().err
    for fact in ("train.batch_tokens = 65,536", "'small' has only 96 windows of 32", "train.batch_tokens = 3072"):
        assert fact in error
    settings = ("train.batch_tokens=3072", "train.max_steps=2", "train.warmup_steps=0")
    assert run_job(dataset.store.url, dataset.put_job("largest", *settings)) == 0


def test_an_unavailable_device_is_refused(dataset: StoredDataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(dataset.store.url, dataset.put_job("fast", "resources.device=cuda")) == 2
    assert "resources.device = 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_steps=0"], "train.max_steps"),
        (["train.sequence_tokens=2048"], "model.context_tokens = 1,024"),
        (["train.micro_batch_sequences=12"], "train.batch_tokens = 522240"),
        (["model.vocabulary=50000"], "unknown setting model.vocabulary"),
        (["resources.nodes=2"], "resources.rendezvous"),
        (["resources.nodes=2", "resources.rendezvous=a:1", "resources.processes=3"], "each of 6 ranks"),
        (["train.start_from=a/b"], "train.start_from"),
    ],
)
def test_invalid_settings_are_refused_before_training(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, overrides)
