"""The leak report of a version: a task, whose result lies beside the manifest; and what is left out of val."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.items import mirror_items
from flows.pages.dataset_card import leak_line
from flows.runtime.artifacts import show
from flows.runtime.progress import Bar, say
from flows.runtime.tasks import worker_count
from model import tokenizer
from model.config import ResourcesConfig, RunConfig
from model.evaluation.hellaswag import completion_style, questions
from model.evaluation.items import Item
from storage.datasets.manifest import ShardRow, read_manifest
from storage.datasets.plan import FilePlan
from storage.datasets.shards import ShardSummary, read_record
from storage.datasets.versions import newest_version
from storage.digests import canonical_json
from storage.inspection import matching
from storage.inspection.leaks import find_repeats
from storage.inspection.lineage import row_numbers
from storage.keys import DatasetKeys
from storage.sources.mirror import locate
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite, read_json


@task(task_run_name="audit-{dataset}", cache_policy=NO_CACHE)
def audit_version(
    dataset: str, manifest: str, items: str | None, resources: ResourcesConfig, store_url: str
) -> dict[str, Any]:
    """The leak report of one version, made unless it is there: `items` is the key of the HellaSwag items, if any."""
    store = open_store(store_url)
    key = DatasetKeys(dataset).leaks(manifest)
    report = read_json(store, key)
    if report is None or report["asked"] != items:
        overwrite(store, key, canonical_json(_report(store, dataset, manifest, items, resources)))
        report = read_json(store, key)
    assert report is not None
    say("audit", leak_line(report))
    show(create_markdown_artifact, markdown=leak_line(report), key="leaks", description=f"Leaks in {dataset}")
    return report


def _report(store: Store, dataset: str, manifest: str, items: str | None, resources: ResourcesConfig) -> dict[str, Any]:
    rows = list(read_manifest(store, dataset, manifest).rows())
    found = [completion_style(one) for one in questions(store.read(items).body, items)] if items else []
    contexts, endings = [_grams(item, ending=False) for item in found], [_grams(item, ending=True) for item in found]
    wanted = np.concatenate([*contexts, *endings, np.empty(0, np.uint64)])
    bar = Bar("audit", len(rows), "shards")
    repeated, hits = find_repeats(
        store.url, dataset, rows, tokenizer.decode_bytes, wanted, worker_count(resources), bar.advance
    )
    bar.close()
    counts = {split: sum(row.documents for row in rows if row.split == split) for split in ("train", "val")}
    in_train = {
        kind: [number for number, grams in enumerate(asked) if np.isin(grams, hits).any()]
        for kind, asked in (("contexts", contexts), ("endings", endings))
    }
    return {
        "dataset": dataset,
        "manifest": manifest,
        "asked": items,
        "documents": counts,
        "duplicates": {"train": repeated.train, "val_in_train": len(repeated.leaks)},
        "examples": repeated.pairs,
        "leaks": repeated.leaks,
        "items": {"count": len(found), "words": matching.WORDS, "shorter": sum(not len(grams) for grams in contexts)}
        | {kind: len(numbers) for kind, numbers in in_train.items()}
        | {"numbers": in_train}
        if items
        else None,
    }


@flow(name="audit", flow_run_name="audit-{config.data.dataset}", validate_parameters=False)
def audit_dataset(config: RunConfig) -> dict[str, Any]:
    """Look for leaks in the dataset's newest version."""
    data, store = config.data, open_store(config.store_url)
    items = mirror_items(config.evaluation.hellaswag, config.store_url) if config.evaluation.hellaswag else None
    manifest = newest_version(store, data.dataset).digest
    return audit_version(data.dataset, manifest, items, config.resources, config.store_url)


@task(task_run_name="leaks-{dataset}", cache_policy=NO_CACHE)
def find_leaks(
    dataset: str,
    plans: Sequence[FilePlan],
    made: Mapping[str, ShardSummary],
    val: Sequence[str],
    resources: ResourcesConfig,
    store_url: str,
) -> dict[str, list[int]]:
    """The rows of each of the shards `val` that occur in another shard: what val is to be made without."""
    chosen = set(val)
    rows = [
        ShardRow(shard_id, *one, "val" if shard_id in chosen else "train")
        for shard_id, one in made.items()
        if one.tokens
    ]
    bar = Bar("leaks", len(rows), "shards")
    nothing = np.empty(0, np.uint64)
    repeated, _ = find_repeats(
        store_url, dataset, rows, tokenizer.decode_bytes, nothing, worker_count(resources), bar.advance
    )
    bar.close()
    return _rows_of(open_store(store_url), dataset, plans, repeated.leaks)


def _rows_of(
    store: Store, dataset: str, plans: Sequence[FilePlan], leaks: Sequence[tuple[str, int]]
) -> dict[str, list[int]]:
    files = {one.file.digest: one.file for one in plans}
    numbers: dict[str, list[int]] = defaultdict(list)
    for shard_id, number in leaks:
        numbers[shard_id].append(number)
    found = {}
    for shard_id, wanted in numbers.items():
        record = read_record(store, dataset, shard_id)
        found[shard_id] = sorted(row_numbers(locate(store, files[record.recipe["source"]]), record, wanted).values())
    return found


def _grams(item: Item, *, ending: bool) -> np.ndarray:
    """Runs of words of an item's context, or those of context and ending together that the context has not."""
    context = matching.ngrams(matching.normalised(tokenizer.decode_bytes(item.context)))
    if not ending:
        return context
    together = [
        matching.ngrams(matching.normalised(tokenizer.decode_bytes(item.context + one))) for one in item.endings
    ]
    return np.setdiff1d(np.concatenate(together), context)
