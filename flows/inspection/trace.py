"""Finds the source documents of a training window or step. Read-only."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from model.config import DataConfig, RunConfig, TrainingConfig
from model.data.order import WindowOrder
from model.runs.run import find_run
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
    """The dataset version whose windows are traced, its source, and the training settings."""

    manifest: Manifest
    data: DataConfig
    train: TrainingConfig

    def order(self, split: str) -> WindowOrder:
        tokens = [row.tokens for row in self.manifest.rows(split)]
        return WindowOrder(tokens, self.train.sequence_tokens, self.train.seed)


def trace_target(store: Store, config: RunConfig) -> TraceTarget:
    """The version and settings of the run, if it was started; else the dataset's newest version and `config`.

    Raises ObjectMissing when neither the run nor the dataset exists.
    """
    run = find_run(store, config.name)
    if run is None:
        return TraceTarget(newest_version(store, config.data.dataset), config.data, config.train)
    pinned = RunConfig.model_validate(run.config, extra="ignore")  # it may hold settings that were removed
    return TraceTarget(read_manifest(store, run.dataset, run.manifest), pinned.data, pinned.train)


def window_range(target: TraceTarget, split: str, window: int | None, step: int | None) -> tuple[int, int]:
    """The first window and the window count. Raises ValueError unless either `window` or a train `step` is given."""
    if (window is None) == (step is None):
        given = "neither" if window is None else "both"
        raise ValueError(f"gpt2 dataset trace needs either --window K or --step N, found {given}. Try --window 0")
    if window is not None:
        return window, 1
    if split != "train":
        raise ValueError(
            f"--step cannot be combined with --split {split}: steps read only the train split. Use --window."
        )
    assert step is not None
    return step * target.train.batch_windows, target.train.batch_windows


def windows(store: Store, target: TraceTarget, split: str, first: int, count: int) -> Iterator[tuple[int, Traced]]:
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
    rows, files = list(target.manifest.rows(split)), _source_files(store, target)
    dataset = target.data.dataset
    cache = ShardCache(store, dataset)
    length = target.train.sequence_tokens
    traced: list[tuple[int, Traced]] = []
    for shard in np.unique(shard_of):  # open each shard and read its source once
        places = np.flatnonzero(shard_of == shard).tolist()
        spans = [(start * length, start * length + length + 1) for start in window_of[places].tolist()]
        parts = lineage.trace(store, dataset, rows[shard], cache.open(rows[shard]), spans, files)
        traced += [(first + places[span], document) for span, document in parts]
    yield from sorted(traced, key=itemgetter(0))


def _source_files(store: Store, target: TraceTarget) -> dict[str, SourceFile]:
    data = target.data
    files = lineage.hub_files(target.manifest)
    if not files:
        with suppress(ValueError, StorageError):  # the source has moved or is gone: show what the store has
            listing, _ = list_source(store, data.source, data.config, data.revision, "train")
            files = {file.digest: file for file in listing.files}
    return files
