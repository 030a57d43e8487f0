"""What a run saw: the windows of a step as its trainer took them, and what checkpoints and evaluations go back to."""

import json
import sys
from collections.abc import Iterator
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

from flows.console import cli
from flows.inspection.trace import ancestry, asked
from model.__main__ import run_job
from model.checkpoints.records import checkpoints
from model.config import RunConfig
from model.data.loader import DataLoader, MicroBatches
from model.runs.job import put_job
from model.runs.run import Run, evaluation_jobs, pin_run, training_job
from storage.datasets.manifest import Manifest
from storage.digests import sha256
from storage.errors import ObjectMissing
from storage.keys import RunKeys
from storage.sources import identity
from storage.stores.store import Store, read_json
from tests.crawl import Crawl
from tests.making import tiny_config

WINDOWS = 8  # of a step
FILES = tuple(f"file_{number:02d}" for number in range(16))  # of one shard of 5 windows each: 2 of val, 14 of train
SETTINGS = ("train.micro_batch_sequences=4", "train.validate_every_steps=0")


class Trained(NamedTuple):
    """A run of 12 steps with 3 checkpoints and their evaluations, and the windows that each step was given."""

    crawl: Crawl
    config: RunConfig
    run: Run
    manifest: Manifest
    steps: list[np.ndarray]

    @property
    def store(self) -> Store:
        return self.crawl.store

    def ancestry(self, checkpoint: int | None, evaluation: str | None = None) -> dict[str, Any]:
        return ancestry(self.store, asked(self.store, self.config), checkpoint, evaluation)

    def files(self, shard_ids: list[str]) -> list[tuple[str, str]]:
        """Name and sha256 of the files that the shards were made of: a shard's name begins with its file's."""
        paths = [self.crawl.source / name for name in sorted(self.crawl.rows)]
        return [
            (path.name, sha256(path.read_bytes()))
            for path in paths
            if any(shard_id.startswith(f"{path.stem}-") for shard_id in shard_ids)
        ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("trained")
    taken: list[np.ndarray] = []

    def keep(self: MicroBatches) -> tuple[Tensor, Tensor]:
        tokens_BT, targets_BT = own(self)
        taken.append(np.concatenate([tokens_BT.numpy(), targets_BT[:, -1:].numpy()], 1))
        return tokens_BT, targets_BT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "REMEMBERED", folder / "digests")
        own = MicroBatches.next
        patch.setattr(MicroBatches, "next", keep)
        crawl = Crawl(folder, names=FILES, count=3)
        manifest = crawl.build()
        config = tiny_config(crawl.config.store_url, crawl.config.data.source, *SETTINGS)
        run = pin_run(crawl.store, config, manifest.digest, None)
        assert run_job(crawl.store.url, put_job(crawl.store, training_job(run))) == 0
        asked = [evaluation_jobs(config, one, manifest.digest, None) for one in checkpoints(crawl.store, run.name)]
        for job in chain(*asked[1:]):
            if job.kind == "val_loss" or (job.kind, job.recipe["step"]) == ("samples", 12):
                assert run_job(crawl.store.url, put_job(crawl.store, job)) == 0
        crawl.write("file_20.parquet", crawl.rows["file_00.parquet"][:2])
        assert crawl.build().parent == manifest.digest  # a newer version, which the run does not know
        crawl.write("file_20.parquet", None)
    micro_batches = len(taken) // 12
    steps = [np.concatenate(taken[step * micro_batches : (step + 1) * micro_batches]) for step in range(12)]
    yield Trained(crawl, config, run, manifest, steps)


def lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> list[dict[str, Any]]:
    """What `gpt2 dataset trace --json` prints."""
    monkeypatch.setattr(sys, "argv", ["gpt2", "dataset", "trace", "--json", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 0, said
    return [json.loads(line) for line in said.out.splitlines()]


# Steps


def test_windows_of_a_step_are_those_that_the_trainer_was_given(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--set", f"store_url={trained.store.url}", "--set", "name=tiny"]  # all else is pinned with the run
    for step in (0, 7, 11):
        found = lines(capsys, monkeypatch, *words, "--step", str(step))
        tokens = [
            (window, [token for line in parts for token in line["ids"]])
            for window, parts in groupby(found, lambda line: line["window"])
        ]
        assert [window for window, _ in tokens] == list(range(step * WINDOWS, (step + 1) * WINDOWS))
        assert [ids for _, ids in tokens] == trained.steps[step].tolist()
        assert all(line["row"] is not None for line in found)


def test_without_a_run_it_is_the_newest_version_and_the_settings_given(trained: Trained) -> None:
    config = trained.config.model_copy(update={"name": "none-such"})
    one = asked(trained.store, config)
    assert (one.run, one.manifest.parent) == (None, trained.manifest.digest)
    assert asked(trained.store, trained.config).manifest == trained.manifest
    with pytest.raises(ObjectMissing, match="name="):
        ancestry(trained.store, one, 0, None)


# Checkpoints


def test_a_checkpoint_names_what_it_was_made_of(trained: Trained) -> None:
    rows = list(trained.manifest.rows("train"))
    order = DataLoader(trained.store, "small", trained.manifest, "train", sequence_tokens=32, seed=1337).order
    counts = []
    for step in (4, 8, 12):
        found = trained.ancestry(step)
        used = {rows[shard].shard_id for shard in order.locate(0, step * WINDOWS)[0]}
        assert used <= set(found["shards"]) <= {row.shard_id for row in rows}
        assert [(file["name"], file["digest"]) for file in found["files"]] == trained.files(found["shards"])
        epochs = pytest.approx(step * WINDOWS / order.epoch_windows, abs=1e-3)
        assert (found["windows"], found["epochs"]) == (step * WINDOWS, epochs)
        named = {name: found[name] for name in ("run", "checkpoint", "dataset", "manifest", "split", "job", "source")}
        assert named == {
            "run": "tiny", "checkpoint": step, "dataset": "small", "manifest": trained.manifest.digest,
            "split": "train", "job": training_job(trained.run).job_id, "source": {},
        }  # fmt: skip
        counts.append(len(found["shards"]))
    assert counts == [8, 14, 14]  # a group of shards, both, and both in the second epoch


def test_the_newest_checkpoint_is_0(trained: Trained) -> None:
    assert trained.ancestry(0) == trained.ancestry(12)


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(trained: Trained) -> None:
    with pytest.raises(ObjectMissing, match=r"step 5.*4, 8, 12"):
        trained.ancestry(5)


# Evaluations


@pytest.mark.parametrize("checkpoint", [8, None])
def test_a_validation_names_all_of_val(trained: Trained, checkpoint: int | None) -> None:
    found = trained.ancestry(checkpoint, "val_loss")
    step = checkpoint or 12
    val = [row.shard_id for row in trained.manifest.rows("val")]
    assert (found["split"], found["shards"], found["checkpoint"]) == ("val", val, step)
    assert (found["evaluation"], found["manifest"]) == ("val_loss", trained.manifest.digest)
    assert [(file["name"], file["digest"]) for file in found["files"]] == trained.files(val)
    kept = read_json(trained.store, RunKeys("tiny").evaluation(step, "val_loss"))
    assert kept is not None
    assert found["metrics"] == kept["metrics"]


def test_samples_were_made_of_no_shard_of_val(trained: Trained) -> None:
    found = trained.ancestry(12, "samples")
    val = {row.shard_id for row in trained.manifest.rows("val")}
    assert found["evaluation"] == "samples"
    assert not val & set(found.get("shards", []))


def test_an_evaluation_that_is_not_there_is_refused_with_those_that_are(trained: Trained) -> None:
    with pytest.raises(ObjectMissing, match=r"'completion'.*samples.*val_loss"):
        trained.ancestry(12, "completion")
    with pytest.raises(ObjectMissing, match=r"'val_loss'.*none"):
        trained.ancestry(4, "val_loss")
    with pytest.raises(ValueError, match="key"):
        trained.ancestry(8, "../../config")


def test_what_is_offered_instead_can_be_asked_for(trained: Trained) -> None:
    """An evaluation of items keeps its answers beside it: they are no evaluation."""
    items = RunKeys("tiny").evaluation_items(8, "completion")
    trained.store.put_new(items, b"rows")
    try:
        with pytest.raises(ObjectMissing) as caught:
            trained.ancestry(8, "none-such")
    finally:
        trained.store.delete(items)
    assert "items" not in str(caught.value)


def test_trace_prints_the_ancestry_as_json(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--set", f"store_url={trained.store.url}", "--set", "name=tiny"]
    assert lines(capsys, monkeypatch, *words, "--checkpoint", "4") == [trained.ancestry(4)]
    assert lines(capsys, monkeypatch, *words, "--evaluation", "val_loss") == [trained.ancestry(0, "val_loss")]
    both = ["--checkpoint", "8", "--evaluation", "val_loss"]
    assert lines(capsys, monkeypatch, *words, *both) == [trained.ancestry(8, "val_loss")]
