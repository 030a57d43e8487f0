"""A run on a mix of datasets: its batches, epochs and val losses, and what it refuses to resume from.

6 steps of 8 windows wrap both datasets.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.__main__ import run_job
from model.checkpoints.records import checkpoints, read_metrics
from model.data.loader import DataLoader
from model.runs.job import put_job, read_job, read_result
from model.runs.run import evaluation_jobs, find_run
from model.training import trainer
from model.training.resume import _check
from model.training.trainer import Trainer
from storage.errors import CheckpointInvalid
from storage.loading.mix import weighted_mean
from storage.loading.windows import MixedWindows
from storage.sources import reading
from storage.stores.opening import open_store
from tests.making import build_other
from tests.model.ranks import SoloRank, UnsynchronisedModel, hashes
from tests.model.training_runs import StoredDataset, final_weights, losses

STEPS, WINDOWS, T = 6, 8, 16
MIX = 'train.mix=["small:0.6", "code:0.4"]'
SETTINGS = (
    MIX, f"train.max_steps={STEPS}", f"train.batch_tokens={WINDOWS * T}", "train.micro_batch_sequences=2",
    f"train.sequence_tokens={T}", "train.validate_every_steps=3", "resources.prefetch_batches=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredDataset]:
    """Two datasets in a store. A run's own dataset is the first."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        url, shards = str(folder / "store"), "data.shard_tokens=500"
        manifest = build_other(url, "small", range(13), shards)
        build_other(url, "code", range(20, 31), shards)
        yield StoredDataset(open_store(url), "small", manifest)


@pytest.fixture(scope="module")
def trained(mixed: StoredDataset) -> str:
    return mixed.train("mixed", *SETTINGS)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_batches_do_not_depend_on_ranks_and_resumes(
    mixed: StoredDataset, trained: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "DistributedDataParallel", UnsynchronisedModel)
    job = read_job(mixed.store, mixed.put_job(f"mix-of-{ranks}", *SETTINGS, "train.validate_every_steps=0"))
    seen: dict[tuple[int, int], list[str]] = {}  # by step and rank
    training: list[Trainer] = []
    take = DataLoader.next
    for stop in (1, 3, None):  # the run resumes twice
        for rank in reversed(range(ranks)):  # the main rank last, because it saves

            def recording(self: DataLoader, rank: int = rank, stop: int | None = stop) -> Any:
                tokens_BT, targets_BT = take(self)
                taken = torch.cat([tokens_BT, targets_BT[:, -1:]], 1).numpy()
                seen.setdefault((training[0].step, rank), []).extend(hashes(taken))
                training[0]._stop_requested = training[0].step == stop
                return tokens_BT, targets_BT

            monkeypatch.setattr(DataLoader, "next", recording)
            training[:] = [Trainer(mixed.store, job, SoloRank(rank, ranks, torch.device("cpu")))]
            training[0].fit()
    windows = MixedWindows(mixed.store, job.mix, "train", sequence_tokens=T, seed=1337)
    assert min(windows.epochs(STEPS * WINDOWS).values()) > 1
    for step in range(STEPS):
        batch = [window for rank in range(ranks) for window in seen[step, rank]]
        assert batch == hashes(windows.read(step * WINDOWS, WINDOWS))
    if ranks == 1:  # the others were not synchronised
        assert losses(mixed.store, job.run) == losses(mixed.store, trained)
        assert final_weights(mixed.store, job.run, STEPS) == final_weights(mixed.store, trained, STEPS)


def test_metrics_have_the_epochs_and_val_losses_of_each_dataset(mixed: StoredDataset, trained: str) -> None:
    run, metrics = find_run(mixed.store, trained), read_metrics(mixed.store, trained)
    assert run is not None
    assert {dataset: share.weight for dataset, share in run.mix.items()} == {"code": 2, "small": 3}
    windows = MixedWindows(mixed.store, run.mix, "train", sequence_tokens=T, seed=1337)
    assert [line.epochs for line in metrics] == [windows.epochs((step + 1) * WINDOWS) for step in range(STEPS)]
    for line in (metrics[2], metrics[5]):
        assert list(line.val_losses) == ["code", "small"]
        assert line.val_loss == weighted_mean(line.val_losses, run.mix)
        assert len({line.val_loss, *line.val_losses.values()}) == 3


def test_an_evaluation_has_the_val_loss_of_each_dataset_and_their_mean(mixed: StoredDataset, trained: str) -> None:
    config, run = mixed.config(trained, *SETTINGS), find_run(mixed.store, trained)
    record = checkpoints(mixed.store, trained)[-1]
    assert run is not None
    metrics = []
    for evaluated in (replace(record, cursor=None), record):
        job = evaluation_jobs(config, evaluated, run.manifest, None)[0]
        assert run_job(mixed.store.url, put_job(mixed.store, job)) == 0
        result = read_result(mixed.store, job)
        assert result is not None
        metrics.append(result["metrics"])
    unmixed, scored = metrics
    assert scored["val_loss_small_t16"] == unmixed["val_loss_t16"]
    assert scored["bits_per_byte_small_t16"] == unmixed["bits_per_byte_t16"]
    mean = 0.6 * scored["val_loss_small_t16"] + 0.4 * scored["val_loss_code_t16"]
    assert scored["val_loss_mix_t16"] == pytest.approx(mean, rel=1e-12)
    assert "val_loss_t16" not in scored  # no published number is shown beside a mix


def test_a_checkpoint_of_other_versions_or_weights_is_refused(mixed: StoredDataset, trained: str) -> None:
    job, record = read_job(mixed.store, mixed.put_job(trained, *SETTINGS)), checkpoints(mixed.store, trained)[-1]
    _check(job, record)
    code = job.recipe["mix"]["code"]
    for change, fact in (({"manifest": "f" * 64}, "mix.code.manifest"), ({"weight": 1}, "mix.code.weight")):
        other = job.recipe | {"mix": job.recipe["mix"] | {"code": code | change}}
        with pytest.raises(CheckpointInvalid, match=fact):
            _check(replace(job, recipe=other), record)
    with pytest.raises(CheckpointInvalid, match=r"mix\.code"):
        _check(replace(job, recipe={name: value for name, value in job.recipe.items() if name != "mix"}), record)


def test_a_dataset_with_fewer_windows_than_a_batch_reads_is_named(
    mixed: StoredDataset, capfd: pytest.CaptureFixture[str]
) -> None:
    key = mixed.put_job("too-few", *SETTINGS, f"train.batch_tokens={1024 * T}")
    assert run_job(mixed.store.url, key) == 2
    assert "'code'" in capfd.readouterr().err
