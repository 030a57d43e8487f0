"""The leak report of a dataset version: a task whose result is stored beside the manifest."""

from typing import Any

import numpy as np
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.inspection.facts import leak_line
from flows.items import mirror_items
from flows.runtime.artifacts import show
from flows.runtime.progress import Bar, say
from flows.runtime.tasks import worker_count
from model import tokenizer
from model.config import ResourcesConfig, RunConfig
from model.evaluation.hellaswag import completion_style, questions
from model.evaluation.items import Item
from storage.datasets.manifest import read_manifest
from storage.datasets.versions import newest_version
from storage.digests import canonical_json
from storage.inspection import matching
from storage.inspection.leaks import find_repeats
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite, read_json


@task(task_run_name="audit-{dataset}", cache_policy=NO_CACHE)
def find_leaks(
    dataset: str, manifest: str, items: str | None, resources: ResourcesConfig, store_url: str
) -> dict[str, Any]:
    """The leak report of one version, made unless it is stored. `items` is the key of the HellaSwag items, if any."""
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


@flow(name="audit", flow_run_name="audit-{config.data.dataset}", validate_parameters=False)
def find_leaks_of_newest(config: RunConfig) -> dict[str, Any]:
    """Look for leaks in the dataset's newest version."""
    data, store = config.data, open_store(config.store_url)
    items = mirror_items(config.evaluation.hellaswag, config.store_url) if config.evaluation.hellaswag else None
    manifest = newest_version(store, data.dataset).digest
    return find_leaks(data.dataset, manifest, items, config.resources, config.store_url)


def _report(store: Store, dataset: str, manifest: str, items: str | None, resources: ResourcesConfig) -> dict[str, Any]:
    rows = list(read_manifest(store, dataset, manifest).rows())
    hellaswag = [completion_style(question) for question in questions(store.read(items).body, items)] if items else []
    contexts = [_context_ngrams(item) for item in hellaswag]
    endings = [_ending_ngrams(item) for item in hellaswag]
    ngrams = np.concatenate([*contexts, *endings, np.empty(0, np.uint64)])
    bar = Bar("audit", len(rows), "shards")
    repeated, in_train = find_repeats(
        store.url, dataset, rows, tokenizer.decode_bytes, ngrams, worker_count(resources), bar.advance
    )
    bar.close()
    numbers = {"contexts": _overlapping(contexts, in_train), "endings": _overlapping(endings, in_train)}
    report: dict[str, Any] = {
        "dataset": dataset,
        "manifest": manifest,
        "asked": items,
        "documents": {split: sum(row.documents for row in rows if row.split == split) for split in ("train", "val")},
        "duplicates": {"train": repeated.train, "val_in_train": len(repeated.leaks)},
        "examples": repeated.pairs,
        "leaks": repeated.leaks,
        "items": None,
    }
    if items:
        report["items"] = {
            "count": len(hellaswag),
            "words": matching.NGRAM_WORDS,
            "shorter": sum(not len(ngrams_of_item) for ngrams_of_item in contexts),
            "contexts": len(numbers["contexts"]),
            "endings": len(numbers["endings"]),
            "numbers": numbers,
        }
    return report


def _overlapping(ngrams_of_items: list[np.ndarray], in_train: np.ndarray) -> list[int]:
    """The numbers of the items that share an n-gram with train."""
    return [number for number, ngrams in enumerate(ngrams_of_items) if np.isin(ngrams, in_train).any()]


def _context_ngrams(item: Item) -> np.ndarray:
    return matching.ngrams(matching.normalised(tokenizer.decode_bytes(item.context)))


def _ending_ngrams(item: Item) -> np.ndarray:
    """The n-grams of context and ending together that the context alone does not have."""
    together = [
        matching.ngrams(matching.normalised(tokenizer.decode_bytes(item.context + ending))) for ending in item.endings
    ]
    return np.setdiff1d(np.concatenate(together), _context_ngrams(item))
