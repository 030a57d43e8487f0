"""The leak report of a dataset version: a task whose result is stored beside the manifest."""

import numpy as np
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.inspection.facts import leak_line
from flows.items import mirror_items
from flows.runtime.page import on_page
from flows.runtime.progress import Bar, say, show
from flows.runtime.tasks import worker_count
from model import tokenizer
from model.config import RunConfig
from model.evaluation.hellaswag import completion_style, questions
from storage.datasets.manifest import read_manifest
from storage.datasets.val_documents import normalised
from storage.datasets.versions import newest_version
from storage.digests import canonical_json
from storage.inspection import matching
from storage.inspection.leaks import ItemOverlap, LeakReport, find_repeats, read_leak_report
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite


@task(task_run_name="audit-{dataset}", cache_policy=NO_CACHE)
def find_leaks(dataset: str, manifest: str, items: str | None, workers: int, store_url: str) -> LeakReport:
    """The leak report of one version, computed unless stored for these `items` (the key of the HellaSwag items)."""
    store = open_store(store_url)
    report = read_leak_report(store, dataset, manifest)
    if report is None or report.items_key != items:
        report = _report(store, dataset, manifest, items, workers)
        overwrite(store, DatasetKeys(dataset).leaks(manifest), canonical_json(report.model_dump()))
        store.delete(DatasetKeys(dataset).page(manifest))  # the next run writes the card with this report
    say("audit", leak_line(report))
    show(create_markdown_artifact, markdown=leak_line(report), key="leaks", description=f"Leaks in {dataset}")
    return report


@flow(name="audit", flow_run_name="audit-{config.data.dataset}", validate_parameters=False)
def find_leaks_of_newest(config: RunConfig) -> LeakReport:
    """Look for leaks in the dataset's newest version."""
    with on_page(config, "audit"):
        data, store = config.data, open_store(config.store_url)
        items = mirror_items(config.evaluation.hellaswag, config.store_url) if config.evaluation.hellaswag else None
        manifest = newest_version(store, data.dataset).digest
        return find_leaks(data.dataset, manifest, items, worker_count(config.resources), config.store_url)


def _report(store: Store, dataset: str, manifest: str, items: str | None, workers: int) -> LeakReport:
    rows = list(read_manifest(store, dataset, manifest).rows())
    contexts, endings = _item_ngrams(store, items) if items else ([], [])
    ngrams = np.concatenate([*contexts, *endings, np.empty(0, np.uint64)])
    with Bar("audit", len(rows), "shards") as bar:
        repeats, in_train = find_repeats(store.url, dataset, rows, tokenizer.decode_bytes, ngrams, workers, bar.advance)
    numbers = {"contexts": _overlapping(contexts, in_train), "endings": _overlapping(endings, in_train)}
    shared = {part: len(of_part) for part, of_part in numbers.items()}
    shorter = sum(not len(context) for context in contexts)
    overlap = ItemOverlap(count=len(contexts), numbers=numbers, shorter=shorter, **shared) if items else None
    documents = {split: sum(row.documents for row in rows if row.split == split) for split in ("train", "val")}
    version = {"dataset": dataset, "manifest": manifest, "items_key": items}
    return LeakReport(documents=documents, items=overlap, **version, **repeats._asdict())


def _item_ngrams(store: Store, key: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each HellaSwag item, the n-grams of its context, and the n-grams that reach into an ending."""
    contexts, endings = [], []
    for item in map(completion_style, questions(store.read(key).body, key)):
        context = _ngrams(item.context)
        together = [_ngrams(item.context + ending) for ending in item.endings]
        contexts.append(context)
        endings.append(np.setdiff1d(np.concatenate(together), context))
    return contexts, endings


def _ngrams(ids: list[int]) -> np.ndarray:
    return matching.ngrams(normalised(tokenizer.decode_bytes(ids)))


def _overlapping(ngrams_of_items: list[np.ndarray], in_train: np.ndarray) -> list[int]:
    return [number for number, ngrams in enumerate(ngrams_of_items) if np.isin(ngrams, in_train).any()]
