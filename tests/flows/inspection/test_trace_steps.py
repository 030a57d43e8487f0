"""`gpt2 dataset trace` shows the windows of a training step that the trainer read."""

from itertools import groupby
from typing import NamedTuple

import numpy as np
import pytest
from torch import Tensor

from flows.inspection.trace import trace_target
from model.__main__ import run_job
from model.config import RunConfig
from model.data.loader import DataLoader
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage.datasets.manifest import Manifest
from storage.sources import reading
from storage.stores.store import Store
from tests.crawl import Crawl
from tests.flows.in_process import Gpt2
from tests.making import tiny_config

STEP_WINDOWS = 8
STEPS = 12
FILES = tuple(f"file_{number:02d}" for number in range(16))  # one shard of 5 windows each: 2 of val, 14 of train
SETTINGS = ("train.micro_batch_sequences=4", "train.validate_every_steps=0")


class Trained(NamedTuple):
    """A run of 12 steps and the windows of each step. The dataset has a newer version since."""

    store: Store
    config: RunConfig
    manifest: Manifest
    step_windows: list[np.ndarray]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    micro_batches: list[np.ndarray] = []

    def next_and_keep(self: DataLoader) -> tuple[Tensor, Tensor]:
        tokens_BT, targets_BT = next_micro_batch(self)
        micro_batches.append(np.concatenate([tokens_BT.numpy(), targets_BT[:, -1:].numpy()], 1))
        return tokens_BT, targets_BT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        next_micro_batch = DataLoader.next
        patch.setattr(DataLoader, "next", next_and_keep)
        crawl = Crawl(folder, names=FILES, count=3)
        manifest = crawl.build()
        config = tiny_config(crawl.config.store_url, crawl.config.data.source, *SETTINGS)
        run = pin_run(crawl.store, config, manifest.digest, None)
        assert run_job(crawl.store.url, put_job(crawl.store, training_job(run))) == 0
        crawl.write("file_20.parquet", crawl.rows["file_05.parquet"][:2])
        assert crawl.build().parent == manifest.digest
        crawl.write("file_20.parquet", None)
    step_windows = [np.concatenate(parts) for parts in np.array_split(np.stack(micro_batches), STEPS)]
    return Trained(crawl.store, config, manifest, step_windows)


@pytest.mark.parametrize("step", [0, 7, 11])
def test_windows_of_a_step_are_those_that_the_trainer_read(trained: Trained, gpt2: Gpt2, step: int) -> None:
    settings = ["--set", f"store_url={trained.store.url}", "--set", "name=tiny"]  # the others are pinned with the run
    documents = gpt2("dataset", "trace", "--json", *settings, "--step", str(step)).json_lines
    windows = {
        window: [token for document in group for token in document["ids"]]
        for window, group in groupby(documents, lambda document: document["window"])
    }
    assert list(windows) == list(range(step * STEP_WINDOWS, (step + 1) * STEP_WINDOWS))
    assert list(windows.values()) == trained.step_windows[step].tolist()
    assert all(document["row"] is not None for document in documents)


def test_without_a_run_the_target_is_the_newest_version_and_the_given_settings(trained: Trained) -> None:
    config = trained.config.model_copy(update={"name": "none-such"})
    target = trace_target(trained.store, config)
    assert (target.data, target.train, target.manifest.parent) == (config.data, config.train, trained.manifest.digest)
    assert trace_target(trained.store, trained.config).manifest == trained.manifest
