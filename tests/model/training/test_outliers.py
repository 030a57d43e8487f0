"""Outlier steps: detected, skipped up to the limit, counted, and judged the same after a resume."""

import math

import pytest
import torch

from model.__main__ import run_job
from model.checkpoints.records import checkpoints, read_metrics
from model.processes.distributed import DDPConfig
from model.runs.job import read_job
from model.training.outliers import FEWEST_STEPS, MEMORY_STEPS, Outliers
from model.training.trainer import Trainer
from tests.model.training_runs import SHORT, STEPS, StoredDataset, assert_equal_runs, final_weights

CPU = DDPConfig(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_nan_and_infinity_are_outliers_from_the_first_step_on(loss: float, norm: float) -> None:
    assert Outliers(9, [], 0).skip(loss, norm)


def test_a_norm_over_ten_times_the_median_is_an_outlier() -> None:
    outliers = Outliers(9, [], 0)
    assert not any(outliers.skip(3.0, 1.0) for _ in range(FEWEST_STEPS - 1))
    assert not outliers.skip(3.0, 50.0)  # too few steps for a median
    assert not outliers.skip(3.0, 10.0)
    assert outliers.skip(3.0, 10.1)
    assert outliers.skip(3.0, 10.1), "an outlier does not change the median"


def test_slowly_falling_norms_are_not_outliers_and_old_norms_expire() -> None:
    outliers = Outliers(9, [], 0)
    assert not any(outliers.skip(3.0, 100 * 0.97**step) for step in range(300))
    assert outliers.skip(3.0, 1.0)  # 100 was normal 300 steps ago; the median of the last 128 is 0.09
    assert not Outliers(9, [0.1] * 1_000 + [5.0] * MEMORY_STEPS, 0).skip(3.0, 40.0)


def training_with_nan(
    dataset: StoredDataset, key: str, nan_steps: set[int], monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    """A training whose gradients are NaN at these steps."""
    training = Trainer(dataset.store, read_job(dataset.store, key), CPU)
    clip = torch.nn.utils.clip_grad_norm_

    def clip_with_nan(parameters: object, most: float) -> torch.Tensor:
        weights = list(parameters)  # type: ignore[call-overload]
        if training.step in nan_steps:
            weights[0].grad[0, 0] = math.nan
        return clip(weights, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_with_nan)
    return training


def test_outliers_are_skipped_up_to_the_limit_and_the_next_one_ends_the_run(
    dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = dataset.put_job("skipping", *SHORT, "train.skip_outlier_steps=2", "train.checkpoint_every_steps=1")
    with pytest.raises(ValueError, match=r"step 9 of run 'skipping'.*after 2 skipped steps") as caught:
        training_with_nan(dataset, key, {3, 5, 9}, monkeypatch).fit()
    first = 9 * 2
    assert f"windows {first} to {first + 1} of manifest {dataset.manifest.digest[:12]}" in str(caught.value)
    assert any(row.shard_id in str(caught.value) for row in dataset.manifest.rows("train"))
    assert "gpt2 dataset trace --step 9" in str(caught.value)
    lines = read_metrics(dataset.store, "skipping")
    assert [line.step for line in lines if line.skipped] == [3, 5]
    assert [line.gradient_norm for line in lines if line.skipped] == [None, None]
    assert checkpoints(dataset.store, "skipping")[-1].step == 9


def test_a_skipped_step_changes_no_weight(dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained = Trainer(dataset.store, read_job(dataset.store, dataset.put_job("fresh", *SHORT)), CPU)
    fresh = torch.cat([weight.detach().flatten() for weight in untrained.model.parameters()])
    key = dataset.put_job("stopped", *SHORT, "train.skip_outlier_steps=1")
    training = Trainer(dataset.store, read_job(dataset.store, key), CPU)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    training._stop_requested = True
    assert training.fit() is None
    assert torch.equal(torch.cat([weight.detach().flatten() for weight in training.model.parameters()]), fresh)


def test_a_resumed_run_counts_the_steps_skipped_before(dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*SHORT, "train.skip_outlier_steps=2", "train.checkpoint_every_steps=1")
    for run in ("skips-undisturbed", "counting"):
        key = dataset.put_job(run, *settings)
        with monkeypatch.context() as patch:
            training = training_with_nan(dataset, key, {2, 7}, patch)
            training._stop_requested = run == "counting"
            stopped = training.fit()
        assert (stopped is None) == (run == "counting")
    with monkeypatch.context() as patch:
        training = training_with_nan(dataset, dataset.put_job("counting", *settings), {2, 7}, patch)
        assert training.step == 1
        training.fit()
    assert_equal_runs(dataset.store, "counting", "skips-undisturbed")
    assert len(read_metrics(dataset.store, "counting")) == STEPS
    assert final_weights(dataset.store, "counting")
    again = Trainer(dataset.store, read_job(dataset.store, dataset.put_job("counting", *settings)), CPU)
    assert again.outliers.skipped == 2


def test_no_step_is_skipped_by_default(dataset: StoredDataset, capsys: pytest.CaptureFixture[str]) -> None:
    key = dataset.put_job("strict", *SHORT, "train.learning_rate=1e15", "train.warmup_steps=0")
    assert run_job(dataset.store.url, key) == 2
    error = capsys.readouterr().err
    assert "train.skip_outlier_steps" in error
    assert "Traceback" not in error
