"""Lineage for people: the source documents behind a training window or step.

Reads the store, and the source files that still exist. Changes nothing and imports no Prefect.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from model.config import RunConfig, TrainingConfig
from model.data.order import WindowOrder
from model.runs.run import Run, find_run
from storage.cache.shards import ShardCache
from storage.datasets.manifest import Manifest, read_manifest
from storage.datasets.versions import newest_version
from storage.errors import StorageError
from storage.inspection import lineage
from storage.inspection.lineage import Traced
from storage.sources.files import SourceFile
from storage.sources.mirror import list_source
from storage.stores.store import Store


@dataclass(frozen=True)
class TraceTarget:
    """The dataset version and training settings whose windows are traced; `run` is None for a run never started."""

    run: Run | None
    dataset: str
    manifest: Manifest
    train: TrainingConfig

    def order(self, split: str) -> WindowOrder:
        """The order of the split's windows."""
        tokens = [row.tokens for row in self.manifest.rows(split)]
        return WindowOrder(tokens, self.train.sequence_tokens, self.train.seed)


def trace_target(store: Store, config: RunConfig) -> TraceTarget:
    """The started run of the configuration's name, or else its settings on the dataset's newest version.

    Raises ObjectMissing when neither the run nor the dataset exists.
    """
    run = find_run(store, config.name)
    if run is None:
        return TraceTarget(None, config.data.dataset, newest_version(store, config.data.dataset), config.train)
    manifest = read_manifest(store, run.dataset, run.manifest)
    return TraceTarget(run, run.dataset, manifest, TrainingConfig.model_validate(run.config["train"]))


def window_range(target: TraceTarget, split: str, window: int | None, step: int | None) -> tuple[int, int]:
    """First window and number of windows of one window or one training step. Raises ValueError unless one is given."""
    if (window is None) == (step is None):
        raise ValueError("give either --window K or --step N, as in: gpt2 dataset trace --split train --window 0")
    if window is not None:
        return window, 1
    if split != "train":
        raise ValueError(f"--step with --split {split}: training steps read only train. Leave --split out.")
    assert step is not None
    count = target.train.batch_windows
    return step * count, count


def windows(
    store: Store, config: RunConfig, target: TraceTarget, split: str, first: int, count: int
) -> Iterator[tuple[int, Traced]]:
    """Yields each window's number with each of its documents: train in training order, val in validation order.

    Raises ValueError when val has no such windows.
    """
    order = target.order(split)
    if split == "val" and first + count > order.epoch_windows:
        raise ValueError(
            f"--window {first}: split val has {order.epoch_windows:,} windows of {target.train.sequence_tokens:,} "
            f"tokens, counted from 0. Give a smaller number."
        )
    if split == "train":
        shard_of, window_of = order.locate(first, count)
    else:
        shard_of, window_of = order.in_file_order(np.arange(first, first + count))
    rows, files = list(target.manifest.rows(split)), _source_files(store, config, target)
    cache = ShardCache(store, target.dataset)
    length = target.train.sequence_tokens
    documents_of: list[list[Traced]] = [[] for _ in range(count)]
    for shard in np.unique(shard_of):  # open each shard and read its source once
        places = np.flatnonzero(shard_of == shard).tolist()
        spans = [(start * length, start * length + length + 1) for start in window_of[places].tolist()]
        traced = lineage.trace(store, target.dataset, rows[shard], cache.open(rows[shard]), spans, files)
        for span, document in traced:
            documents_of[places[span]].append(document)
    for place, documents in enumerate(documents_of):
        for document in documents:
            yield first + place, document


def _source_files(store: Store, config: RunConfig, target: TraceTarget) -> dict[str, SourceFile]:
    """The source files that still exist, by digest."""
    files = lineage.hub_files(target.manifest)
    if files:
        return files
    data = config.data
    if target.run is not None:
        data = RunConfig.model_validate({"data": target.run.config["data"]}).data
    with suppress(ValueError, StorageError):  # the source moved or is gone: show what the store holds
        listed, _ = list_source(store, data.source, data.config, data.revision, "train")
        return {file.digest: file for file in listed.files}
    return {}
