"""Where a training begins: at another run's checkpoint when asked, and never with what cannot be trained."""

import re

import pytest

from model.__main__ import run_job
from model.checkpoints.records import checkpoints, read_metrics
from model.config_file import load_config
from model.runs.run import Start, find_run, pin_run, pinned_run, training_job
from storage.errors import DatasetMismatch, ObjectMissing
from storage.keys import RunKeys
from tests.model.training_runs import SHORT, STEPS, House, final_weights, history, losses

# From another run


def test_a_run_that_starts_with_everything_of_another_goes_on_as_that_one_would(house: House) -> None:
    whole = house.trained_here("whole", *SHORT)
    house.trained_here("half", *SHORT, "train.checkpoint_every_steps=6", "train.keep_last=9")
    at_six = next(record for record in checkpoints(house.store, "half") if record.step == 6)
    for record in checkpoints(house.store, "half"):
        if record.step > 6:
            house.store.delete(RunKeys("half").checkpoint_record(record.step))
    branch = house.trained_here("branch", *SHORT, "train.start_from=half", "train.start_with=everything")
    assert find_run(house.store, branch).start == Start("half", 6, at_six.attempt)
    assert losses_from(house, branch, 6) == losses(house.store, whole)[6:]
    assert final_weights(house.store, branch) == final_weights(house.store, whole)


def losses_from(house: House, run: str, step: int) -> list[float]:
    """The losses of a run whose metrics begin at that step."""
    lines = read_metrics(house.store, run)
    assert [line.step for line in lines] == list(range(step, STEPS))
    return [line.loss for line in lines]


def test_a_run_that_starts_with_weights_begins_its_own_schedule(house: House) -> None:
    taught = house.trained_here("taught", *SHORT)
    run = house.trained_here("pupil", *SHORT, "train.start_from=taught", "train.seed=5")
    found = history(house.store, run)
    assert found[0]["step"] == 0
    assert found[0]["learning_rate"] == history(house.store, taught)[0]["learning_rate"]
    assert found[0]["loss"] < losses(house.store, taught)[0] - 1
    assert found[0]["loss"] == pytest.approx(losses(house.store, taught)[-1], abs=0.3)


def test_another_schedule_under_the_same_name_is_refused_with_the_way_to_go_on(house: House) -> None:
    house.trained_here("fixed", *SHORT)
    with pytest.raises(DatasetMismatch) as caught:
        pinned_run(house.store, house.config("fixed", *SHORT, "train.max_steps=99"))
    for said in ("train.max_steps is 12, not 99", "train.start_from=fixed", "train.start_with=everything"):
        assert said in str(caught.value)


def test_how_it_runs_may_change_under_the_same_name_and_names_the_same_job(house: House) -> None:
    run = pin_run(house.store, house.config("same", *SHORT), house.manifest.digest, None)
    other = house.config("same", *SHORT, "train.micro_batch_sequences=1", "train.compile=off", "train.keep_last=9",
                         "train.checkpoint_every_steps=2", "train.keep_every_steps=7")  # fmt: skip
    again = pinned_run(house.store, other)
    assert again == run
    assert again is not None
    assert training_job(again).job_id == training_job(run).job_id
    assert training_job(again).how.train["micro_batch_sequences"] == 1


@pytest.mark.parametrize("parent", ["nobody", "unsaved"])
def test_there_must_be_something_to_start_from(house: House, parent: str) -> None:
    if parent == "unsaved":
        house.ask(parent)
    with pytest.raises(ObjectMissing, match=r"train\.start_from") as caught:
        house.ask("child", f"train.start_from={parent}")
    assert parent in str(caught.value)
    assert "gpt2 import" in str(caught.value)


def test_a_start_that_was_given_up_since_is_named(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.trained_here("fleeting", *SHORT)
    key = house.ask("late", *SHORT, "train.start_from=fleeting")
    house.store.delete(RunKeys("fleeting").checkpoint_record(STEPS))
    assert run_job(house.store.url, key) == 2
    said = capsys.readouterr().err
    assert "'fleeting'" in said
    assert f"step {STEPS}" in said


def test_with_everything_there_must_be_a_step_left(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.trained_here("over", *SHORT)
    key = house.ask("more", *SHORT, "train.start_from=over", "train.start_with=everything")
    assert run_job(house.store.url, key) == 2
    assert "no steps left" in capsys.readouterr().err


def test_a_model_of_another_shape_cannot_be_started_from(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.trained_here("narrow", *SHORT)
    key = house.ask("wide", *SHORT, "train.start_from=narrow", "model.width=32")
    assert run_job(house.store.url, key) == 2
    assert "weights of another model" in capsys.readouterr().err


# What cannot be trained


def test_less_text_than_one_batch_is_refused(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    key = house.ask("huge", "train.batch_tokens=65536")
    assert run_job(house.store.url, key) == 2
    said = capsys.readouterr().err
    for word in ("train.batch_tokens = 65,536", "'small' has 96 windows of 32 tokens", "train.batch_tokens = 3,072"):
        assert word in said
    assert run_job(house.store.url, house.ask("largest", "train.batch_tokens=3072", "train.max_steps=2",
                                              "train.warmup_steps=0")) == 0  # fmt: skip


def test_a_device_that_is_not_there_is_refused(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(house.store.url, house.ask("fast", "resources.device=cuda")) == 2
    assert "resources.device = 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
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
def test_settings_that_cannot_be_are_refused_before_anything_starts(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        load_config(None, overrides)
