"""Steps that are far off: found, left out as often as is allowed, counted, and judged alike after a resume."""

import math

import pytest
import torch

from model.__main__ import run_job
from model.checkpoints.records import checkpoints, read_metrics
from model.processes.distributed import DDPConfig
from model.runs.job import read_job
from model.training.outliers import FEWEST_STEPS, MEMORY_STEPS, Outliers
from model.training.trainer import Trainer
from tests.model.training_runs import SHORT, STEPS, House, assert_equal_runs, final_weights

CPU = DDPConfig(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_no_number_is_an_outlier_from_the_first_step_on(loss: float, norm: float) -> None:
    assert Outliers(1, [], 0).judge(loss, norm)


def test_a_norm_is_far_off_at_ten_times_the_median_once_there_is_one() -> None:
    outliers = Outliers(1, [], 0)
    assert not any(outliers.judge(3.0, 1.0) for _ in range(FEWEST_STEPS - 1))
    assert not outliers.judge(3.0, 50.0)  # too early to tell
    assert not outliers.judge(3.0, 10.0)
    assert outliers.judge(3.0, 10.1)
    assert outliers.judge(3.0, 10.1), "an outlier moves nothing"


def test_norms_that_fall_slowly_are_no_outliers_and_old_ones_are_forgotten() -> None:
    outliers = Outliers(1, [], 0)
    assert not any(outliers.judge(3.0, 100 * 0.97**step) for step in range(300))
    assert outliers.judge(3.0, 1.0)  # 100 was usual 300 steps ago; the last 128 have a median of 0.09
    assert not Outliers(1, [0.1] * 1_000 + [5.0] * MEMORY_STEPS, 0).judge(3.0, 40.0)


def spoilt(house: House, key: str, at: set[int], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A training whose gradients are no numbers at these steps."""
    training = Trainer(house.store, read_job(house.store, key), CPU)
    clip = torch.nn.utils.clip_grad_norm_

    def spoiling(parameters: object, most: float) -> torch.Tensor:
        weights = list(parameters)  # type: ignore[call-overload]
        if training.step in at:
            weights[0].grad[0, 0] = math.nan
        return clip(weights, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiling)
    return training


def test_as_many_as_allowed_are_skipped_and_counted_and_the_next_ends_the_run(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = house.ask("skipping", *SHORT, "train.skip_outlier_steps=2", "train.checkpoint_every_steps=1")
    with pytest.raises(ValueError, match=r"step 9 of run 'skipping'.*after 2 skipped steps") as caught:
        spoilt(house, key, {3, 5, 9}, monkeypatch).fit()
    first = 9 * 2
    assert f"windows {first} to {first + 1} of manifest {house.manifest.digest[:12]}" in str(caught.value)
    assert any(row.shard_id in str(caught.value) for row in house.manifest.rows("train"))
    assert "gpt2 dataset trace --step 9" in str(caught.value)
    lines = read_metrics(house.store, "skipping")
    assert [line.step for line in lines if line.skipped] == [3, 5]
    assert [line.gradient_norm for line in lines if line.skipped] == [None, None]
    assert checkpoints(house.store, "skipping")[-1].step == 9


def test_a_skipped_step_changes_no_weight(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = Trainer(house.store, read_job(house.store, house.ask("fresh", *SHORT)), CPU)
    fresh = torch.cat([weight.detach().flatten() for weight in calm.model.parameters()])
    key = house.ask("stopped", *SHORT, "train.skip_outlier_steps=1")
    again = Trainer(house.store, read_job(house.store, key), CPU)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    again._stop_requested = True
    assert again.fit() is None
    assert torch.equal(torch.cat([weight.detach().flatten() for weight in again.model.parameters()]), fresh)


def test_a_run_that_goes_on_counts_the_steps_that_were_skipped_before(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SHORT, "train.skip_outlier_steps=2", "train.checkpoint_every_steps=1")
    for run in ("calm-skips", "counting"):
        key = house.ask(run, *words)
        with monkeypatch.context() as patch:
            training = spoilt(house, key, {2, 7}, patch)
            training._stop_requested = run == "counting"
            stopped = training.fit()
        assert (stopped is None) == (run == "counting")
    with monkeypatch.context() as patch:
        training = spoilt(house, house.ask("counting", *words), {2, 7}, patch)
        assert training.step == 1
        training.fit()
    assert_equal_runs(house.store, "counting", "calm-skips")
    assert len(read_metrics(house.store, "counting")) == STEPS
    assert final_weights(house.store, "counting")
    again = Trainer(house.store, read_job(house.store, house.ask("counting", *words)), CPU)
    assert again.outliers.skipped == 2


def test_without_leave_nothing_is_skipped(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    key = house.ask("strict", *SHORT, "train.learning_rate=1e30", "train.warmup_steps=0")
    assert run_job(house.store.url, key) == 2
    said = capsys.readouterr().err
    assert "train.skip_outlier_steps" in said
    assert "Traceback" not in said
