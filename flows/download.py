"""The first stage: find the source files, bring those of the Hub into the store, plan which rows become which shard.

A file whose shards are all made is neither fetched nor read again: its plan is in the store.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.handoffs import Downloaded
from flows.items import mirror_items
from flows.runtime.progress import Bar, say
from flows.runtime.tasks import in_window, is_transient, retry_if_transient
from model import tokenizer
from model.config import DataConfig, RunConfig
from model.runs.run import pinned_run
from storage.datasets.manifest import pinned_left_out, read_manifest
from storage.datasets.plan import DatasetSettings, FilePlan, plan_file, plan_files, put_plan, read_plan
from storage.datasets.shards import finished_shards, recorded_shards
from storage.sources.files import Listing, SourceFile, check_distinct
from storage.sources.mirror import list_source, locate, mirror
from storage.stores.opening import open_store
from storage.stores.store import Store

FILES_AT_ONCE = 4  # connections to the Hub: it answers a crowd with 429, and four fill a line of 1 Gbit/s
PLANS_AT_ONCE = 16  # of a bucket each is a round trip


@task(task_run_name="list-{data.source}", cache_policy=NO_CACHE)
def list_files(data: DataConfig, store_url: str) -> Listing:
    """The source's files: of the Hub one request while nothing has changed, of this host each one's digest."""
    found, why = list_source(open_store(store_url), data.source, data.config, data.revision, "train")
    if why:
        say("download", f"the files of commit {found.origin['commit'][:12]} are taken, as found earlier: {why}")
    return found


@task(
    task_run_name="file-{file.name}", cache_policy=NO_CACHE,
    retries=2, retry_delay_seconds=[5, 30], retry_jitter_factor=0.5, retry_condition_fn=retry_if_transient,
)  # fmt: skip
def prepare_file(
    file: SourceFile, data: DataConfig, store_url: str, limit_tokens: int, come: Callable[[str, int], None]
) -> FilePlan:
    """Bring a file of the Hub into the store, then plan it. `come` is told the bytes that are there."""
    store, shape = open_store(store_url), _shape(data)
    located = mirror(store, file, partial(come, file.digest)) if data.mirror else locate(store, file)
    planned = read_plan(store, data.dataset, file, shape, limit_tokens)
    if planned is None:
        planned = replace(plan_file(located, shape, limit_tokens), file=file)
        put_plan(store, data.dataset, planned, limit_tokens)
    come(file.digest, file.size_bytes)
    return planned


def download(config: RunConfig, *, with_items: bool = True) -> Downloaded:
    """Run the stage, a few files at once; a dataset alone needs no items to evaluate with."""
    return download_flow.with_options(task_runner=_few_at_once())(config, with_items)


def _few_at_once() -> TaskRunner[Any]:
    return ThreadPoolTaskRunner(FILES_AT_ONCE)


@flow(name="download", flow_run_name="download-{config.data.dataset}", validate_parameters=False)
def download_flow(config: RunConfig, with_items: bool = True) -> Downloaded:
    """Find and plan the source files. A run that is pinned to a complete manifest needs none of them."""
    data = config.data
    store = open_store(config.store_url, create=True)
    run = pinned_run(store, config)
    if run is not None:
        manifest = read_manifest(store, run.dataset, run.manifest)
        if len(finished_shards(store, run.dataset, manifest.shard_ids, manifest.made)) == len(manifest.shard_ids):
            say("download", f"nothing to do, the run is pinned to manifest {run.manifest[:12]}")
            return Downloaded([], {}, run.items, [])
        data = data.model_copy(update={"revision": run.commit or data.revision})
    found = list_files(data, config.store_url)
    check_distinct(found.files)
    plans, failed = _limited(config, store, found) if data.max_tokens else _all(config, store, found)
    if run is None and not failed:
        _check_planned(data, plans)
    wanted = config.evaluation.hellaswag if with_items else ""
    items = mirror_items(wanted, config.store_url) if wanted else None
    size_bytes = sum(one.file.size_bytes for one in plans)
    say("download", f"{len(plans):,} of {len(found.files):,} source files, {size_bytes / 1e6:,.1f} MB")
    return Downloaded(plans, found.origin, items, failed)


def _check_planned(data: DataConfig, plans: list[FilePlan]) -> None:
    """Raise ValueError when the source gives too few shards: before anything of it is made."""
    planned = sum(len(one.row_ends) for one in plans)
    if not planned:
        raise ValueError(
            f"data.source = {data.source!r}: documents were asked for, found {len(plans)} files without a "
            f"single row{' that data.filters keeps' if data.filters else ''}. Give files that hold text."
        )
    if planned <= data.val_shards:
        raise ValueError(
            f"data.val_shards = {data.val_shards}: the source gives {planned} shards of up to "
            f"{data.shard_tokens:,} tokens, so none would be left to train on. Use fewer data.val_shards or smaller "
            f"data.shard_tokens."
        )


def _all(config: RunConfig, store: Store, found: Listing) -> tuple[list[FilePlan], list[str]]:
    """The plans of all files, several at once; one that cannot be had now stands in nobody's way."""
    data, shape = config.data, _shape(config.data)
    with ThreadPoolExecutor(PLANS_AT_ONCE) as pool:
        known = list(pool.map(lambda file: read_plan(store, data.dataset, file, shape), found.files))
    left_out = pinned_left_out(store, data.dataset) or {}
    plans = {one.file: replace(one, left_out=left_out) for one in known if one}
    asked = [file for file in found.files if file not in plans]
    if data.mirror and found.origin:
        there = recorded_shards(store, data.dataset)
        made = {file for file, one in plans.items() if there.issuperset(one.shard_ids)}
        asked = [file for file in found.files if file not in made]
    come: Counter[str] = Counter()
    bar = Bar("download", sum(file.size_bytes for file in asked) // 1_000_000, f"MB of {len(asked):,} source files")
    errors: list[BaseException] = []
    for file, error, future in in_window(
        asked,
        lambda file: prepare_file.submit(file, data, config.store_url, 0, come.__setitem__),
        FILES_AT_ONCE * 4,
        lambda: bar.to(sum(list(come.values())) // 1_000_000),
    ):
        if error is None:
            plans[file] = replace(future.result(), left_out=left_out)
        else:
            errors.append(error)
    bar.close()
    for error in errors:
        if len(errors) == len(found.files) or not is_transient(error):
            raise error
    return [plans[file] for file in found.files if file in plans], [str(error) for error in errors]


def _limited(config: RunConfig, store: Store, found: Listing) -> tuple[list[FilePlan], list[str]]:
    """The plans of the first files that hold `max_tokens`, one after the other: no file more is fetched."""
    data = config.data
    come: Counter[str] = Counter()

    def make(file: SourceFile, limit_tokens: int) -> FilePlan:
        return prepare_file(file, data, config.store_url, limit_tokens, come.__setitem__)

    left_out = pinned_left_out(store, data.dataset)
    return list(plan_files(store, data.dataset, found.files, _shape(data), make, left_out)), []


def _shape(data: DataConfig) -> DatasetSettings:
    return data.settings(tokenizer.identity()["sha256"])
