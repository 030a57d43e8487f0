"""The first stage: find source files, mirror those of the Hub, plan shards. Files with all shards done are skipped."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.demo import reads_corpus, write_corpus
from flows.handoffs import Downloaded
from flows.items import mirror_items
from flows.runtime.progress import Bar, say
from flows.runtime.tasks import in_window, is_transient, retries
from model import tokenizer
from model.config import DataConfig, RunConfig
from model.runs.run import pinned_run
from storage.datasets.building import val_split
from storage.datasets.manifest import read_manifest
from storage.datasets.plan import FilePlan, plan_file, plan_files, put_plan, read_plan
from storage.datasets.records import finished_shards
from storage.datasets.sealing import check_binding
from storage.keys import DatasetKeys
from storage.sources.files import Listing, SourceFile
from storage.sources.mirror import list_source, mirror
from storage.stores.opening import open_store
from storage.stores.store import Store

FILES_AT_ONCE = 4  # connections to the Hub: more get status 429, and four saturate 1 Gbit/s
RUNNER: TaskRunner[Any] = ThreadPoolTaskRunner(FILES_AT_ONCE)
PLANS_AT_ONCE = 16  # reading a plan from a bucket takes a round trip


@task(task_run_name="list-{data.source}", cache_policy=NO_CACHE)
def list_files(data: DataConfig, store_url: str) -> Listing:
    """List the source's files. An unchanged Hub dataset costs one request; local files are hashed."""
    if reads_corpus(data.source):
        write_corpus()
    store = open_store(store_url)
    listing, unavailable = list_source(store, data.source, data.config, data.revision, "train", filters=data.filters)
    if unavailable:
        reason = unavailable.partition(". ")[0]  # without the error's remedy: the build continues
        say("download", f"using the earlier listing of commit {listing.origin['commit'][:12]}: {reason}")
    if listing.ignored:
        say("download", f"not read: {'; '.join(listing.ignored)}")
    return listing


@task(task_run_name="file-{file.name}", cache_policy=NO_CACHE, **retries(5, 30))
def prepare_file(
    file: SourceFile, limit_tokens: int, data: DataConfig, store_url: str, on_progress: Callable[[str, int], None]
) -> FilePlan:
    """Mirror or convert a file that needs it, then plan it. `on_progress` receives its digest and the bytes fetched."""
    store, settings = open_store(store_url), data.spec(tokenizer.identity()).settings
    copy = mirror(store, file, partial(on_progress, file.digest), keep=data.mirror)
    plan = read_plan(store, data.dataset, file, settings, limit_tokens)
    if plan is None:
        plan = plan_file(file, settings, tokenizer.encode, limit_tokens, copy)
        put_plan(store, data.dataset, plan, limit_tokens)
    on_progress(file.digest, file.size_bytes)
    return plan


@flow(name="download", flow_run_name="download-{config.data.dataset}", validate_parameters=False, task_runner=RUNNER)
def download(config: RunConfig, with_items: bool = True) -> Downloaded:
    """Find and plan the source files, unless the store has all shards of the manifest that the run is pinned to."""
    data = config.data
    store = open_store(config.store_url, create=True)
    run = pinned_run(store, config)
    if run is not None:
        manifest = read_manifest(store, run.dataset, run.manifest)
        finished = finished_shards(store, run.dataset, manifest.shard_ids, manifest.rows_by_id)
        if len(finished) == len(manifest.shard_ids):
            say("download", f"nothing to do: the store has all shards of the run's manifest {run.manifest[:12]}")
            return Downloaded([], {}, run.items, [])
        data = data.model_copy(update={"revision": run.commit or data.revision})
    listing = list_files(data, config.store_url)
    if data.max_tokens:  # later files are not downloaded
        settings = data.spec(tokenizer.identity()).settings
        make_plan = partial(prepare_file, data=data, store_url=config.store_url, on_progress=lambda *_: None)
        plans, failed = list(plan_files(store, data.dataset, listing.files, settings, make_plan)), list[str]()
    else:
        plans, failed = _plan_all(config, store, listing)
    if run is None and not failed:
        _check_planned(data, plans)
    hellaswag = config.evaluation.hellaswag if with_items else ""
    items = mirror_items(hellaswag, config.store_url) if hellaswag else None
    size_bytes, tokens = sum(plan.file.size_bytes for plan in plans), sum(plan.tokens for plan in plans)
    estimated = ", estimated from a sample" if any(plan.estimated for plan in plans) else ""
    size = f"{size_bytes / 1e6:,.1f} MB, {tokens:,} tokens{estimated}"
    members = sum(len(file.members) or 1 for file in listing.files)
    packed = f" (packed from {members:,})" if members > len(listing.files) else ""
    say("download", f"{len(plans):,} of {len(listing.files):,} source files{packed}, {size}")
    return Downloaded(plans, listing.origin, items, failed)


def _check_planned(data: DataConfig, plans: list[FilePlan]) -> None:
    shards = sum(len(plan.row_ends) for plan in plans)
    if shards <= data.val_shards:
        rows = sum(plan.row_ends[-1] for plan in plans if plan.row_ends)
        tokens = max(sum(plan.tokens for plan in plans), 10)
        given = f"{data.source!r} gives {shards} shards ({rows:,} rows) of up to {data.shard_tokens:,} tokens"
        remedy = f"Try data.val_shards=1 and data.shard_tokens={tokens // 10}, fewer filters, or more text."
        raise ValueError(f"data.val_shards = {data.val_shards}: {given}: none for train. {remedy}")


def _plan_all(config: RunConfig, store: Store, listing: Listing) -> tuple[list[FilePlan], list[str]]:
    """The plans, and errors of unavailable files. Raises any other error, and that of a file on which val depends."""
    data, spec = config.data, config.data.spec(tokenizer.identity())
    with ThreadPoolExecutor(PLANS_AT_ONCE) as pool:
        stored = pool.map(lambda file: read_plan(store, data.dataset, file, spec.settings), listing.files)
    plans = {plan.file: plan for plan in stored if plan}
    done = {file for file in plans if file.is_read_by_rows and not (data.mirror and listing.origin)}
    if len(done) < len(plans):  # a file must be in the store while one of its shards is missing
        split = val_split(store, spec, [plans[file] for file in listing.files if file in plans])
        record, shards = DatasetKeys(data.dataset).record, DatasetKeys(data.dataset).shards
        recorded = {listed.key for listed in store.list(shards)}
        done |= {file for file in plans if recorded.issuperset(record(job.shard_id) for job in plans[file].jobs(split))}
    to_prepare = [file for file in listing.files if file not in done]
    fetched_bytes: Counter[str] = Counter()
    total_bytes = sum(file.size_bytes for file in to_prepare)
    errors: list[BaseException] = []
    with Bar("download", total_bytes // 1_000_000, f"MB of {len(to_prepare):,} source files") as bar:
        for file, error, future in in_window(
            to_prepare,
            lambda file: prepare_file.submit(file, 0, data, config.store_url, fetched_bytes.__setitem__),
            FILES_AT_ONCE * 4,
            lambda: bar.to(sum(list(fetched_bytes.values())) // 1_000_000),
        ):
            if error is None:
                plans[file] = future.result()
            else:
                errors.append(error)
    # The first files become val, or all files have a part in it, and every train shard depends on val.
    first = [len(plans[file].row_ends) for file in takewhile(plans.__contains__, listing.files)]
    has_val = not errors or (data.val_choice == "first" and sum(first) >= data.val_shards)
    is_val_known = has_val or check_binding(store, spec) is not None
    for error in errors:
        if not is_val_known or not is_transient(error):
            raise error
    return [plans[file] for file in listing.files if file in plans], [str(error) for error in errors]
