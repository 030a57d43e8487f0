"""Finds the source documents of a training window or step. Read-only."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from model.config import DataConfig, RunConfig, TrainingConfig
from model.runs.run import find_run
from storage.cache.shards import ShardCache
from storage.datasets.manifest import Manifest, read_manifest
from storage.datasets.versions import newest_version
from storage.errors import StorageError
from storage.inspection import lineage
from storage.inspection.lineage import Traced
from storage.loading.order import WindowOrder
from storage.sources.files import SourceFile
from storage.sources.mirror import list_source
from storage.stores.store import Store


@dataclass(frozen=True)
class TraceTarget:
    """The dataset version whose windows are traced, its source, and the training settings."""

    manifest: Manifest
    data: DataConfig
    train: TrainingConfig


def trace_target(store: Store, config: RunConfig) -> TraceTarget:
    """The version and settings of the run; if it was never started, the dataset's newest version and `config`."""
    run = find_run(store, config.name)
    if run is None:
        return TraceTarget(newest_version(store, config.data.dataset), config.data, config.train)
    pinned = RunConfig.model_validate(run.config, extra="ignore")  # it may hold settings that were removed
    return TraceTarget(read_manifest(store, run.dataset, run.manifest), pinned.data, pinned.train)


def windows(store: Store, target: TraceTarget, split: str, first: int, count: int) -> Iterator[tuple[int, Traced]]:
    """Each window's number and documents, in training or validation order. Raises ValueError past the end of val."""
    rows, length, dataset = list(target.manifest.rows(split)), target.train.sequence_tokens, target.data.dataset
    order = WindowOrder([row.tokens for row in rows], length, target.train.seed)
    if split == "val" and first + count > order.epoch_windows:
        raise ValueError(f"--window {first}: val has only {order.epoch_windows} windows, from 0. Use a smaller one.")
    if split == "train":
        shard_of, window_of = order.locate(first, count)
    else:
        shard_of, window_of = order.in_file_order(np.arange(first, first + count))
    files, cache = _source_files(store, target), ShardCache(store, dataset)
    traced: list[tuple[int, Traced]] = []
    for shard in np.unique(shard_of):  # open each shard and read its source once
        places = np.flatnonzero(shard_of == shard).tolist()
        spans = [(start * length, start * length + length + 1) for start in window_of[places].tolist()]
        parts = lineage.trace(store, dataset, rows[shard], cache.open(rows[shard]), spans, files)
        traced += [(first + places[span], document) for span, document in parts]
    yield from sorted(traced, key=itemgetter(0))


def _source_files(store: Store, target: TraceTarget) -> dict[str, SourceFile]:
    data = target.data
    if not (files := lineage.hub_files(target.manifest)):
        with suppress(ValueError, StorageError):  # the source has moved or is gone: show what the store has
            listing, _ = list_source(store, data.source, data.config, data.revision, "train")
            files = {file.digest: file for file in listing.files}
    return files
