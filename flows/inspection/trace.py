"""Lineage for people: the documents behind a window or a step, and what a checkpoint or an evaluation was made of.

Reads the store, and the source files where they are at hand; changes nothing, imports no Prefect.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.checkpoints.records import checkpoints
from model.config import RunConfig, TrainingConfig
from model.data.order import WindowOrder
from model.runs.run import Run, find_run
from storage.cache.shards import ShardCache
from storage.datasets.manifest import Manifest, read_manifest
from storage.datasets.records import read_record
from storage.datasets.versions import newest_version
from storage.errors import ObjectMissing, StorageError
from storage.inspection import lineage
from storage.inspection.lineage import Traced
from storage.keys import RunKeys
from storage.sources.files import SourceFile
from storage.sources.mirror import list_source
from storage.stores.store import Store, read_json

OF_VAL = ("val_loss", "completion")  # evaluations that read the val split; the others read only what was learnt


@dataclass(frozen=True)
class Asked:
    """Whose windows are looked at: a run that was started, or what a configuration would train on now."""

    run: Run | None
    dataset: str
    manifest: Manifest
    train: TrainingConfig

    def order(self, split: str) -> WindowOrder:
        """The order of the split's windows."""
        tokens = [row.tokens for row in self.manifest.rows(split)]
        return WindowOrder(tokens, self.train.sequence_tokens, self.train.seed)


def asked(store: Store, config: RunConfig) -> Asked:
    """The run of the configuration's name as it is pinned, else the configuration on the dataset's newest version."""
    run = find_run(store, config.name)
    if run is None:
        return Asked(None, config.data.dataset, newest_version(store, config.data.dataset), config.train)
    manifest = read_manifest(store, run.dataset, run.manifest)
    return Asked(run, run.dataset, manifest, TrainingConfig.model_validate(run.config["train"]))


def windows(
    store: Store, config: RunConfig, one: Asked, split: str, first: int, count: int
) -> Iterator[tuple[int, Traced]]:
    """Each window with the documents in it: of train as training sees them, of val as validation does.

    Raises ValueError when there are no such windows.
    """
    order = one.order(split)
    if split == "val" and first + count > order.epoch_windows:
        raise ValueError(
            f"--window {first}: split val has {order.epoch_windows:,} windows of {one.train.sequence_tokens:,} tokens, "
            f"counted from 0. Give a smaller number."
        )
    located = order.locate(first, count) if split == "train" else order.in_file_order(np.arange(first, first + count))
    rows, files = list(one.manifest.rows(split)), _files(store, config, one)
    shard_of, window_of = located
    cache = ShardCache(store, one.dataset)
    length = one.train.sequence_tokens
    found: list[list[Traced]] = [[] for _ in range(count)]
    for shard in np.unique(shard_of):  # each shard is opened, and its source read, once
        here = np.flatnonzero(shard_of == shard).tolist()
        spans = [(window * length, window * length + length + 1) for window in window_of[here].tolist()]
        documents = lineage.trace(store, one.dataset, rows[shard], cache.open(rows[shard]), spans, files)
        for number, document in documents:
            found[here[number]].append(document)
    for number, documents_of in enumerate(found):
        yield from ((first + number, document) for document in documents_of)


def _files(store: Store, config: RunConfig, one: Asked) -> dict[str, SourceFile]:
    """The source files at hand, by digest."""
    files = lineage.hub_files(one.manifest)
    if not files:
        data = config.data if one.run is None else RunConfig.model_validate({"data": one.run.config["data"]}).data
        with suppress(ValueError, StorageError):  # moved or gone: what the store holds is shown all the same
            found, _ = list_source(store, data.source, data.config, data.revision, "train")
            files = {file.digest: file for file in found.files}
    return files


def ancestry(store: Store, one: Asked, checkpoint: int | None, evaluation: str | None) -> dict[str, Any]:
    """What a checkpoint (the newest: 0), and an evaluation of it, goes back to: manifest, shards, source files.

    Raises ObjectMissing when the run, its checkpoint or that evaluation is not there.
    """
    if one.run is None:
        raise ObjectMissing(
            "a checkpoint or an evaluation was asked for, no run of that name was started. Give --set name=…"
        )
    run, found = one.run, {record.step: record for record in checkpoints(store, one.run.name)}
    step = checkpoint or max(found, default=0)
    if step not in found:
        raise ObjectMissing(
            f"run {run.name!r} keeps no checkpoint of step {step:,}, found {', '.join(map(str, found)) or 'none'}."
            f" Give one of these."
        )
    facts: dict[str, Any] = {"run": run.name, "checkpoint": step, "job": found[step].job}
    split, windows_used = "train", int(found[step].cursor["next_window"])
    if evaluation:
        facts |= _evaluation(store, run, step, evaluation)
        split = "val" if evaluation in OF_VAL else split
    order, rows = one.order(split), list(one.manifest.rows(split))
    if split == "train":
        facts |= {"windows": windows_used, "epochs": round(windows_used / order.epoch_windows, 4)}
        used = order.shards_before(windows_used)
    else:
        used = list(range(len(rows)))
    source = one.manifest.source
    records = [read_record(store, one.dataset, rows[shard].shard_id) for shard in used]
    digests = {record.recipe.source: record.source for record in records}
    return facts | {
        "dataset": one.dataset,
        "manifest": one.manifest.digest,
        "split": split,
        "shards": [record.shard_id for record in records],
        "source": {name: value for name, value in source.items() if name != "files"},
        "files": [{"name": name, "digest": digest} for digest, name in digests.items()],
    }


def _evaluation(store: Store, run: Run, step: int, name: str) -> dict[str, Any]:
    found = read_json(store, RunKeys(run.name).evaluation(step, name))
    if found is None:
        prefix = f"{RunKeys(run.name).evaluations}{step:06d}/"
        names = (one.key.removeprefix(prefix) for one in store.list(prefix))
        there = sorted(one.removesuffix(".json") for one in names if one.endswith(".json"))
        raise ObjectMissing(
            f"run {run.name!r} has no evaluation {name!r} of step {step:,}, found {', '.join(there) or 'none'}. "
            f"Give one of these."
        )
    return {"evaluation": name, "metrics": found["metrics"], "items": found.get("file")}
