"""The second stage: run the missing shard jobs (`storage/datasets/building.py`) as tasks, then seal the manifest."""

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from itertools import groupby
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from flows.handoffs import DatasetVersion, Downloaded
from flows.leaks import find_leaks
from flows.runtime.ending import ending
from flows.runtime.page import run_page
from flows.runtime.progress import Bar, say, show
from flows.runtime.tasks import in_window, is_transient, retries, worker_count
from model import tokenizer
from model.config import ResourcesConfig, RunConfig, check_extra
from model.runs.job import OUT_OF_MEMORY, JobFailed, note_failure
from model.runs.run import Run, pinned_run
from storage.datasets import building
from storage.datasets.manifest import Manifest, read_manifest
from storage.datasets.plan import FilePlan, ShardJob, ValSplit
from storage.datasets.records import is_finished
from storage.datasets.sealing import check_rebuilt
from storage.datasets.shards import build_shard
from storage.errors import DatasetMismatch, SourceUnavailable, StorageError
from storage.keys import DatasetKeys, failure
from storage.stores.opening import open_store
from storage.stores.store import Store

IN_FLIGHT = 4  # tasks submitted per worker: enough to keep all busy, few enough to keep the flow small
MOST_TASKS = 2_000  # per flow run: more slow down its page and Prefect's server
MOST_LINES = 1_000  # in the table of shard jobs
MOST_POOLS = 3  # process pools to try: a killed worker process breaks its pool


@task(task_run_name="{name}", cache_policy=NO_CACHE, **retries(2, 10))  # Prefect's cache can outlive the data
def tokenise_shards(name: str, jobs: list[ShardJob], dataset: str, store_url: str) -> Any:  # noqa: ARG001  # run name
    """Make shards of one source file and their records, unless done. A failed shard does not stop the others."""
    store = open_store(store_url)
    made = 0
    errors: list[Exception] = []
    for job in jobs:
        record_key = DatasetKeys(dataset).record(job.shard_id)
        try:
            if not is_finished(store, dataset, job.shard_id):
                record = build_shard(store, dataset, job, tokenizer.encode, tokenizer.EOT)
                store.delete(failure(record_key))
                get_run_logger().info(f"{job.name}: {record.tokens:,} tokens of {record.documents:,} documents")
                made += 1
        except (ValueError, StorageError, OSError, MemoryError) as error:
            errors.append(error)
            if isinstance(error, MemoryError):
                rows = f"rows {job.recipe.row_from:,} to {job.recipe.row_to - 1:,} of {job.source.name!r}"
                errors[-1] = JobFailed(f"shard {job.name!r}, {rows}: {OUT_OF_MEMORY}")
            note_failure(store, record_key, str(errors[-1]))
    if errors:
        raise max(errors, key=is_transient)  # Prefect retries the task after a transient error
    return made if made else Completed(name="Skipped", message="already done")


@task(task_run_name="seal-{dataset}", cache_policy=NO_CACHE)
def seal_dataset(dataset: str, build: building.Build, origin: dict[str, str], store_url: str) -> Manifest:  # noqa: ARG001  # run name
    """Write the manifest of all planned shards and point `latest` at it, unless nothing changed."""
    return building.finish_build(open_store(store_url), build, origin)


@flow(name="tokenise", flow_run_name="tokenise-{config.data.dataset}", validate_parameters=False)
def tokenise_flow(config: RunConfig, downloaded: Downloaded) -> DatasetVersion:
    """Bring the dataset up to date with its source files. For a pinned run, only rebuild its lost shards."""
    store = open_store(config.store_url, create=True)
    run = pinned_run(store, config)
    manifest = _repair(store, config, run, downloaded) if run else _build(store, config, downloaded)
    dataset = config.data.dataset
    table = [{"split": split} | counts for split, counts in manifest.totals.items()]
    title = f"Dataset {dataset}, manifest {manifest.digest}"
    show(create_table_artifact, table=table, key="dataset-manifest", description=title)
    if config.resources.audit:
        find_leaks(dataset, manifest.digest, downloaded.items, worker_count(config.resources), config.store_url)
    return DatasetVersion(manifest.digest, manifest.origin.get("commit"), downloaded.items)


def tokenise(config: RunConfig, downloaded: Downloaded) -> DatasetVersion:
    """Run the stage, again while killed workers break its process pool. Raises JobFailed after MOST_POOLS pools."""
    for number in range(1, MOST_POOLS + 1):
        try:
            with ending():
                return tokenise_flow.with_options(task_runner=task_runner(config.resources))(config, downloaded)
        except BrokenExecutor:
            say("tokenise", f"process pool {number} of at most {MOST_POOLS} ended: a worker process was killed")
    problem = f"a worker process was killed in each of {MOST_POOLS} process pools"
    raise JobFailed(f"dataset {config.data.dataset!r}: {problem}. Probably {OUT_OF_MEMORY}")


def task_runner(resources: ResourcesConfig) -> TaskRunner[Any]:
    """The task runner for the shard jobs. Every runner gives the same bytes. Raises ValueError if Dask is missing."""
    workers = worker_count(resources)
    if resources.runner == "processes":
        return ProcessPoolTaskRunner(workers)
    if resources.runner == "threads":
        return ThreadPoolTaskRunner(workers)
    check_extra("dask", "prefect_dask")
    import dask
    from prefect_dask.task_runners import DaskTaskRunner

    if resources.dask_address:
        return DaskTaskRunner(address=resources.dask_address)
    dask.config.set({f"distributed.{process}.http.routes": [] for process in ("scheduler", "worker")})  # no web pages
    # A Dask cluster runs what anyone sends it. `security`: TLS with a certificate that only its own processes have.
    cluster = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None, "security": True}
    return DaskTaskRunner(cluster_kwargs=cluster)


def _build(store: Store, config: RunConfig, downloaded: Downloaded) -> Manifest:
    """Make the missing shards, then seal. If nothing changed, no version is added."""
    dataset = config.data.dataset
    build = building.start_build(store, config.data.spec(tokenizer.identity()), downloaded.plans)
    parts = _in_order(store, dataset, build.plans, build.split, build.missing)
    _run_jobs(config, parts, len(build.missing), len(build.planned))
    if downloaded.failed:
        problem = f"{len(downloaded.failed):,} source files were unavailable; the shards of the others are done"
        raise SourceUnavailable(f"dataset {dataset!r}: {problem}. {downloaded.failed[0]}")
    quoted: Any = quote(build)  # else Prefect searches all plans for futures; the task receives the build itself
    manifest = seal_dataset(dataset, quoted, downloaded.origin, config.store_url)
    name = f"manifest {manifest.digest[:12]}"
    is_new = build.parent is None or build.parent.digest != manifest.digest
    say("tokenise", f"sealed {name}" if is_new else f"{name} is unchanged")
    return manifest


def _repair(store: Store, config: RunConfig, run: Run, downloaded: Downloaded) -> Manifest:
    """Rebuild only the shards of the run's manifest that the store lacks. A pinned run gets no new version."""
    manifest = read_manifest(store, run.dataset, run.manifest)
    split = building.val_split(store, config.data.spec(tokenizer.identity()), downloaded.plans)
    try:
        lost = building.lost_shards(store, run.dataset, manifest, downloaded.plans, split)
    except DatasetMismatch:
        if downloaded.failed:  # their shards are not lost for good
            raise SourceUnavailable(downloaded.failed[0]) from None
        raise
    parts = _in_order(store, run.dataset, downloaded.plans, split, lost)
    _run_jobs(config, parts, len(lost), len(manifest.shard_ids))
    check_rebuilt(store, run.dataset, manifest, lost)
    return manifest


def _in_order(
    store: Store, dataset: str, plans: list[FilePlan], split: ValSplit, missing: Collection[str]
) -> Iterator[Iterator[ShardJob]]:
    """The missing val shards. Once these are done, hashes their documents, then yields the missing train shards."""
    yield building.missing_jobs(plans, split, missing, "val")
    building.put_val_documents(store, dataset, split, tokenizer.decode_bytes)
    yield building.missing_jobs(plans, split, missing, "train")


def _groups(jobs: Iterable[ShardJob], size: int) -> Iterator[list[ShardJob]]:
    """Consecutive jobs of one file, `size` at most: the shards of one task."""
    for _, jobs_of_file in groupby(jobs, key=lambda job: job.source):
        group = list(jobs_of_file)
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _run_jobs(config: RunConfig, parts: Iterable[Iterable[ShardJob]], missing: int, total: int) -> None:
    """Run the missing jobs as tasks, and show them in a table. Raises a part's first error after all of its tasks."""
    dataset = config.data.dataset
    say("tokenise", f"{total - missing:,} of {total:,} shards done")
    shown = run_page()
    before = {"shards": f"{total - missing:,} others", "state": "Already done", "why": "", "to run it again": ""}
    shown.show("Shards", [before | {"shards": f"{total - missing:,} of {total:,}"}])
    if not missing:
        return
    lines = [before] if missing < total else []
    retry_command = ""
    errors: list[BaseException] = []
    with Bar("tokenise", missing, "shards") as bar:
        for part in parts:
            for group, error, future in in_window(
                _groups(part, config.resources.shards_per_task or -(-missing // MOST_TASKS)),
                lambda group: tokenise_shards.submit(_task_name(group), group, dataset, config.store_url),
                IN_FLIGHT * worker_count(config.resources),
            ):
                bar.advance(len(group))
                if error:
                    errors.append(error)
                    retry_command = retry_command or _retry_command(config)
                if error or len(lines) < MOST_LINES:
                    line = {"shards": _task_name(group), "state": str(future.state.name), "why": str(error or "")}
                    line["to run it again"] = retry_command if error else ""
                    lines = sorted([*lines, line], key=lambda line: not line["why"])  # failures first
                    shown.show("Shards", lines)
            if errors:
                break
    show(create_table_artifact, table=lines, key="shard-status", description=f"Shard jobs of {dataset}")
    if errors:
        if len(errors) > 1:
            say("tokenise", f"{len(errors):,} tasks failed; gpt2 status lists the failed shards")
        raise errors[0]
    say("tokenise", f"{total:,} of {total:,} shards done, {missing:,} of them built now")


def _retry_command(config: RunConfig) -> str:
    """The command that repeats the failed jobs: `prefect flow-run retry` for a deployment's run, else `gpt2 retry`."""
    try:
        with get_client(sync_client=True) as client:
            root = client.read_flow_run(UUID(flow_run.root_flow_run_id))
    except httpx.HTTPError:  # the command is only shown to people
        return f"gpt2 retry {config.data.dataset}"
    if root.deployment_id is not None:
        return f"prefect flow-run retry {root.id}"
    return f"gpt2 retry {config.name if root.name == f'pretrain-{config.name}' else config.data.dataset}"


def _task_name(jobs: list[ShardJob]) -> str:
    more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    return f"shard-{jobs[0].name}{more}"
