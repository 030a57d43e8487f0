"""Training ends early when the val loss stops falling: as a result, at the same step on all ranks and after a crash."""

import pytest

from flows.inspection.status import run_status
from flows.train import _summary
from model.__main__ import run_job
from model.checkpoints.records import StepMetrics, checkpoints, chosen, read_metrics
from model.config_file import load_config
from model.evaluation.evaluator import Evaluator, ValLoss
from model.runs.job import read_job, read_result
from model.runs.run import find_run, training_job
from model.training.metrics import MetricsLog
from storage.errors import ObjectMissing
from storage.keys import RunKeys
from tests.making import read_json
from tests.model.ranks import TrainingRequest, train
from tests.model.training_runs import SHORT, StoredDataset, copy_checkpoints, losses

STILL = ("train.batch_tokens=64", "train.learning_rate=1e-30", "train.min_learning_rate=0")  # no weight ever changes
EARLY = (*STILL, "train.validate_every_steps=2", "train.patience_validations=2")
BEST, END = 2, 6


@pytest.fixture(scope="module")
def early(dataset: StoredDataset) -> str:
    return dataset.train("early", *EARLY, "train.checkpoint_every_steps=1000", "train.keep_last=1")


def test_patience_counts_validations_since_the_lowest(dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """An equal loss is not lower. The first validation cannot end a run."""
    losses = iter([5.0, 6.0, 4.0, 7.0, 3.0, 3.0, 9.0, 1.0])
    monkeypatch.setattr(Evaluator, "val_loss", lambda *_: ValLoss(next(losses), 1, 0, 0))
    run = dataset.train("scripted", *EARLY, "train.validate_every_steps=1", "train.checkpoint_every_steps=1")
    assert checkpoints(dataset.store, run)[-1].step == 7
    assert chosen(dataset.store, run, "best")[0].step == 5


def test_a_run_without_progress_ends_early_with_a_result_and_its_best_checkpoint(
    dataset: StoredDataset, early: str
) -> None:
    job = read_job(dataset.store, dataset.put_job(early, *EARLY))
    assert (read_result(dataset.store, job) or {})["step"] == END
    assert [record.step for record in checkpoints(dataset.store, early)] == [BEST, END]
    assert [record.step for record in chosen(dataset.store, early, "best")] == [BEST]
    [state] = [line.state for line in run_status(dataset.store, early) if line.what.strip() == "train"]
    assert state == "done"
    summary = _summary(END, 12, read_metrics(dataset.store, early), done_before=False)
    assert summary.startswith(f"{END} of 12 steps done")
    assert summary.endswith(f"since step {BEST}")


def test_the_end_is_the_same_after_a_crash(
    dataset: StoredDataset, early: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = dataset.put_job("early-crashed", *EARLY, "train.checkpoint_every_steps=4")
    add = MetricsLog.add

    def crash(log: MetricsLog, metrics: StepMetrics) -> None:
        if metrics.step == END - 2:  # after the checkpoint of step 4, whose metrics hold two val losses
            raise RuntimeError("pulled the plug")
        add(log, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", crash)
        assert run_job(dataset.store.url, key) == 1
    assert run_job(dataset.store.url, key) == 0
    assert losses(dataset.store, "early-crashed") == losses(dataset.store, early)
    key = dataset.put_job("unanswered-early", *EARLY)  # killed between the last checkpoint and the result
    copy_checkpoints(dataset.store, early, "unanswered-early", END)
    capsys.readouterr()
    assert run_job(dataset.store.url, key) == 0
    assert "loss" not in capsys.readouterr().out
    assert (read_result(dataset.store, read_job(dataset.store, key)) or {})["step"] == END


def test_two_ranks_end_at_the_same_step(dataset: StoredDataset) -> None:
    key = dataset.put_job("early-2", *EARLY, "train.micro_batch_sequences=1")
    [observed] = train([TrainingRequest(dataset.store.url, key)], 2)
    assert set(observed.steps) == set(range(END))


def test_a_run_that_ended_early_is_extended_under_a_new_name(dataset: StoredDataset, early: str) -> None:
    more = ("train.start_from=early", "train.start_with=everything", "train.max_steps=14")
    dataset.train("longer", *EARLY, *more, "train.learning_rate=1e-2", "train.checkpoint_every_steps=1")
    lines = read_metrics(dataset.store, "longer")
    assert [line.step for line in lines] == list(range(END, 14))
    assert lines[-1].loss < losses(dataset.store, early)[-1] - 0.4
    assert chosen(dataset.store, "longer", "best")[0].val_loss == min(line.val_loss for line in lines if line.val_loss)


def test_a_run_without_these_settings_keeps_its_recipe_and_records(dataset: StoredDataset) -> None:
    """A checkpoint has a val loss only if it was saved at a validation."""
    dataset.train("patient", *SHORT)
    run = find_run(dataset.store, "patient")
    assert run is not None
    assert not {"patience_validations", "keep_best"} & training_job(run).recipe["train"].keys()
    assert "patience_validations" not in run.config["train"]
    assert "val_loss" not in (read_json(dataset.store, RunKeys("patient").checkpoint_record(12)) or {})
    with pytest.raises(ObjectMissing, match=r"'best'.*steps 4, 8, 12, none of them saved at a validation"):
        chosen(dataset.store, "patient", "best")


def test_patience_without_validations_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.validate_every_steps"):
        load_config(None, ["train.patience_validations=1", "train.validate_every_steps=0"])
