"""Finds the source documents of a training window or step. Read-only."""

from collections.abc import Iterator
from contextlib import suppress
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from model.config import DataConfig, RunConfig, TrainingConfig
from model.runs.run import find_mix, find_run
from storage.datasets.manifest import Manifest, read_manifest
from storage.datasets.sealing import Split
from storage.datasets.versions import newest_version
from storage.errors import StorageError
from storage.inspection import lineage
from storage.inspection.lineage import Traced
from storage.keys import DatasetKeys
from storage.loading.mix import Share
from storage.loading.windows import MixedWindows
from storage.sources.files import SourceFile
from storage.sources.mirror import list_source
from storage.stores.store import Store, read_as


class TraceTarget(NamedTuple):
    """The dataset version whose windows are traced, its source, the training settings, and the datasets of a mix."""

    manifest: Manifest
    data: DataConfig
    train: TrainingConfig
    mix: dict[str, Share]


def trace_target(store: Store, config: RunConfig) -> TraceTarget:
    """The version and settings of the run; if it was never started, the dataset's newest version and `config`."""
    run = find_run(store, config.name)
    if run is None:
        newest = newest_version(store, config.data.dataset)
        return TraceTarget(newest, config.data, config.train, find_mix(store, config, newest.digest))
    train = RunConfig.model_validate(run.config, extra="ignore").train  # it may hold settings that were removed
    data = config.data.model_copy(update={"dataset": run.dataset})  # a run's source may be the default
    return TraceTarget(read_manifest(store, run.dataset, run.manifest), data, train, run.mix)


def windows(store: Store, target: TraceTarget, split: str, first: int, count: int) -> Iterator[tuple[int, Traced]]:
    """Each window's number and documents, in training or validation order. Raises ValueError past the end of val."""
    length, own = target.train.sequence_tokens, {target.data.dataset: Share(target.manifest.digest, 1)}
    mix = target.mix if target.mix and split == "train" else own
    mixed = MixedWindows(store, mix, split, sequence_tokens=length, seed=target.train.seed)
    traced: list[tuple[int, Traced]] = []
    for dataset, start, numbers in mixed.order.parts(first, count):
        part = mixed.splits[dataset]
        order, files = part.order, _source_files(store, target, dataset, part.manifest)
        if split == "val" and first + count > order.epoch_windows:
            raise ValueError(f"--window {first}: val has only {order.epoch_windows} windows, from 0. Use a lower one.")
        located = order.locate(start, len(numbers)) if split == "train" else order.in_file_order(first + numbers)
        for shard in np.unique(located[0]):  # open each shard and read its source once
            places, row = np.flatnonzero(located[0] == shard), part.rows[shard]
            spans = [(start * length, start * length + length + 1) for start in located[1][places].tolist()]
            documents = lineage.trace(store, dataset, row, part.cache.open(row), spans, files)
            traced += [(first + int(numbers[places[span]]), document) for span, document in documents]
    yield from sorted(traced, key=itemgetter(0))


def _source_files(store: Store, target: TraceTarget, dataset: str, manifest: Manifest) -> dict[str, SourceFile]:
    """The files of a version by digest, from the source that its builds had, unless data.source is given."""
    data, filters = target.data, manifest.recipe.filters
    if not (files := lineage.hub_files(manifest)):
        with suppress(ValueError, StorageError):  # the source has moved or is gone: show what the store has
            split = read_as(store, DatasetKeys(dataset).split, Split)
            is_given = dataset == data.dataset and "source" in data.model_fields_set
            source = data.source if is_given or not split else split.bound.get("source", data.source)
            listing, _ = list_source(store, source, data.config, data.revision, "train", filters=filters)
            files = {file.digest: file for file in listing.files}
    return files
