"""The second stage: run just the shard jobs that are missing, seal the manifest."""

from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.handoffs import DatasetVersion, Downloaded
from flows.leaks import audit_version, find_leaks
from flows.runtime.artifacts import show
from flows.runtime.progress import Bar, say
from flows.runtime.tasks import in_window, is_transient, retry_if_transient, worker_count
from model import tokenizer
from model.config import DataConfig, ResourcesConfig, RunConfig
from model.runs.job import JobFailed, note_failure
from model.runs.run import Run, pinned_run
from storage import keys
from storage.datasets import shards
from storage.datasets.lease import claim
from storage.datasets.manifest import (
    Manifest,
    check_binding,
    check_rebuilt,
    latest_manifest,
    pinned_left_out,
    read_manifest,
    seal,
)
from storage.datasets.plan import FilePlan, ShardJob
from storage.errors import DatasetMismatch, SourceUnavailable, StorageError
from storage.keys import DatasetKeys
from storage.sources.files import Listing
from storage.stores.opening import open_store
from storage.stores.store import Store

IN_FLIGHT = 4  # tasks submitted a worker: enough to keep all busy, few enough to keep the flow small
MOST_TASKS = 2_000  # of one flow run: beyond, its page and Prefect's server suffer
MOST_LINES = 1_000  # of the table of shard jobs
POOLS = 3  # begun in a row, where a process of each is killed


@task(
    task_run_name="{name}",
    cache_policy=NO_CACHE,  # Prefect's cache says `Cached` even when the data is gone; the record is the truth
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_jitter_factor=0.5,
    retry_condition_fn=retry_if_transient,
)
def tokenise_shards(name: str, jobs: list[ShardJob], dataset: str, store_url: str) -> Any:  # noqa: ARG001  # `name` names it
    """Make some shards of one source file and their records, or find them; a failed one stops no other."""
    store = open_store(store_url)
    made, errors = 0, {}
    for job in jobs:
        try:
            made += _make(store, dataset, job)
        except (ValueError, StorageError, OSError) as error:
            note_failure(store, DatasetKeys(dataset).record(job.shard_id), str(error))
            errors[job.shard_id] = error
    if errors:
        passing = [
            error for error in errors.values() if is_transient(error)
        ]  # worth another try: the shards made are kept
        raise [*passing, *errors.values()][0]
    return made if made else Completed(name="Skipped", message="the records were there")


def _make(store: Store, dataset: str, job: ShardJob) -> bool:
    """Make one shard; False when it was there."""
    if shards.is_finished(store, dataset, job.shard_id):
        return False
    record = shards.build_shard(store, dataset, job, tokenizer.encode, tokenizer.EOT)
    store.delete(keys.failure(DatasetKeys(dataset).record(job.shard_id)))
    get_run_logger().info("%s: %s tokens of %s documents", job.shard_id, f"{record.tokens:,}", f"{record.documents:,}")
    return True


@task(task_run_name="seal-{data.dataset}", cache_policy=NO_CACHE)
def seal_dataset(
    planned: list[str], source: dict[str, Any], data: DataConfig, store_url: str, left_out: dict[str, list[int]]
) -> Manifest:
    """Write the manifest of all planned shards and point `latest` at it."""
    identity = tokenizer.identity()
    return seal(
        open_store(store_url),
        data.dataset,
        planned,
        recipe=data.settings(identity["sha256"]).recipe(),
        tokenizer=identity,
        source=source,
        binding=data.binding(identity["sha256"]),
        val_shards=data.val_shards,
        left_out=left_out,
    )


@flow(name="tokenise", flow_run_name="tokenise-{config.data.dataset}", validate_parameters=False)
def tokenise_flow(config: RunConfig, downloaded: Downloaded) -> DatasetVersion:
    """Bring the dataset to the state the sources ask for."""
    store = open_store(config.store_url, create=True)
    run = pinned_run(store, config)
    manifest = _mend(store, config, run, downloaded) if run else _build(store, config, downloaded)
    _show(manifest, config.data.dataset)
    if config.resources.audit:
        audit_version(config.data.dataset, manifest.digest, downloaded.items, config.resources, config.store_url)
    return DatasetVersion(manifest.digest, manifest.source.get("commit"), downloaded.items)


def tokenise(config: RunConfig, downloaded: Downloaded) -> DatasetVersion:
    """Run the stage on the task runner that `resources.runner` names.

    A pool of processes of which one was killed is broken for good: the stage begins again with a new one.
    """
    for _ in range(POOLS):
        try:
            return tokenise_flow.with_options(task_runner=task_runner(config.resources))(config, downloaded)
        except BrokenExecutor:
            say("tokenise", "a worker process was killed: what is missing is made by new ones")
    raise JobFailed(
        f"dataset {config.data.dataset!r}: {POOLS} pools of processes were begun, of each a process was killed, as the "
        f"system does when memory is short. Let fewer work at once: --set resources.workers=1. What is made stays."
    )


def task_runner(resources: ResourcesConfig) -> TaskRunner[Any]:
    """What runs the shard jobs: the same task code and the same bytes under each."""
    count = worker_count(resources)
    if resources.runner == "processes":
        return ProcessPoolTaskRunner(count)
    if resources.runner == "threads":
        return ThreadPoolTaskRunner(count)
    try:
        from prefect_dask.task_runners import DaskTaskRunner  # an extra
    except ImportError as error:
        raise ValueError(
            "resources.runner = 'dask': prefect-dask is not installed. Install the extra: pip install -e '.[dask]'"
        ) from error
    if resources.dask_address:
        return DaskTaskRunner(address=resources.dask_address)
    return DaskTaskRunner(cluster_kwargs={"n_workers": count, "threads_per_worker": 1, "dashboard_address": None})


def _build(store: Store, config: RunConfig, downloaded: Downloaded) -> Manifest:
    """Make what the sources need and the store lacks, then seal; nothing new gives no new version."""
    data = config.data
    check_binding(store, data.dataset, data.binding(tokenizer.identity()["sha256"]))
    left_out = pinned_left_out(store, data.dataset)
    plans = [replace(one, left_out=left_out or {}) for one in downloaded.plans]
    planned = [shard_id for one in plans for shard_id in one.shard_ids]
    claim(store, data.dataset, "build")  # before anything that is there is counted on
    latest = latest_manifest(store, data.dataset)
    finished = shards.finished_shards(store, data.dataset, planned, latest.made if latest else {})
    missing = set(planned) - set(finished)
    _run_missing(config, plans, missing, len(planned))
    if downloaded.failed:
        raise SourceUnavailable(
            f"dataset {data.dataset!r}: {len(downloaded.failed):,} source files could not be had, the shards of all "
            f"others are made. {downloaded.failed[0]}"
        )
    if latest:
        check_rebuilt(store, data.dataset, latest, missing)
    if left_out is None and data.drop_val_leaks:
        plans, left_out = _without_leaks(store, config, plans, planned)
        planned = [shard_id for one in plans for shard_id in one.shard_ids]
    source = Listing(tuple(one.file for one in plans), downloaded.origin).described()
    manifest = seal_dataset(planned, source, data, config.store_url, left_out or {})
    for shard_id in shards.failures(store, data.dataset) if missing else ():  # of jobs that nobody asks for any more
        store.delete(keys.failure(DatasetKeys(data.dataset).record(shard_id)))
    pinned = f"manifest {manifest.digest[:12]}"
    say("tokenise", f"{pinned} is unchanged" if latest and latest.digest == manifest.digest else f"sealed {pinned}")
    return manifest


def _without_leaks(
    store: Store, config: RunConfig, plans: list[FilePlan], planned: list[str]
) -> tuple[list[FilePlan], dict[str, list[int]]]:
    """The plans with the val shards that lack what is in train, those shards made, and the rows they lack."""
    data = config.data
    made = shards.finished_shards(store, data.dataset, planned, {})
    val = planned[: data.val_shards]
    left_out = find_leaks(data.dataset, plans, made, val, config.resources, config.store_url)
    count = sum(len(rows) for rows in left_out.values())
    if count == sum(made[shard_id].documents for shard_id in val):
        raise ValueError(
            f"data.drop_val_leaks: a val split without what is in train was asked for, found all of its {count:,} "
            f"documents in train. Give more data.val_shards, or leave data.drop_val_leaks out."
        )
    say("leaks", f"{count:,} documents of {len(left_out):,} val shards are in train too: left out of val")
    plans = [replace(one, left_out=left_out) for one in plans]
    again = {shard_id for one in plans for shard_id in one.shard_ids} - set(planned)
    _run_missing(config, plans, again - set(shards.finished_shards(store, data.dataset, again, {})), len(planned))
    return plans, left_out


def _mend(store: Store, config: RunConfig, run: Run, downloaded: Downloaded) -> Manifest:
    """Make again just the shards of the run's manifest that the store has lost; a pinned run gets no new version."""
    manifest = read_manifest(store, run.dataset, run.manifest)
    lost = set(manifest.shard_ids) - set(shards.finished_shards(store, run.dataset, manifest.shard_ids, manifest.made))
    found = lost.intersection(shard_id for one in downloaded.plans for shard_id in one.shard_ids)
    if len(found) < len(lost):
        raise DatasetMismatch(
            f"run {run.name!r} needs {len(lost):,} lost shards of manifest {run.manifest[:12]}, the source gives "
            f"{len(found):,} of them: it has changed. Put the old source files back, or start a run of another name."
        )
    _run_missing(config, downloaded.plans, lost, len(manifest.shard_ids))
    check_rebuilt(store, run.dataset, manifest, lost)
    return manifest


def _groups(plans: list[FilePlan], missing: set[str], resources: ResourcesConfig) -> Iterator[list[ShardJob]]:
    """The missing jobs, so many consecutive ones of a file a task."""
    size = resources.shards_per_task or -(-len(missing) // MOST_TASKS)
    for one in plans:
        jobs = [job for job in one.jobs() if job.shard_id in missing]
        yield from (jobs[start : start + size] for start in range(0, len(jobs), size))


def _run_missing(config: RunConfig, plans: list[FilePlan], missing: set[str], total: int) -> None:
    """Submit the jobs that are missing of `total`, a window at a time, and show what became of each."""
    dataset = config.data.dataset
    say("tokenise", f"{total - len(missing):,} of {total:,} shards done")
    if not missing:
        return
    bar = Bar("tokenise", len(missing), "shards")
    others = {"shards": f"{total - len(missing):,} others", "state": "Done before", "why": "", "to run it again": ""}
    lines: list[dict[str, Any]] = [others] if len(missing) < total else []
    again = ""
    errors: list[BaseException] = []
    settled = 0
    for jobs, error, future in in_window(
        _groups(plans, missing, config.resources),
        lambda jobs: tokenise_shards.submit(_name(jobs), jobs, dataset, config.store_url),
        IN_FLIGHT * worker_count(config.resources),
    ):
        settled += len(jobs)
        bar.to(settled)
        errors += [error] if error else []
        if error or len(lines) < MOST_LINES:
            again = again or (_retry_command(config) if error else "")
            line = {"shards": _name(jobs), "state": future.state.name, "why": str(error or "")[:300]}
            lines.append(line | {"to run it again": again if error else ""})
    show(create_table_artifact, table=lines, key="shard-status", description=f"Shard jobs of {dataset}")
    bar.close()
    if errors:
        if len(errors) > 1:
            say("tokenise", f"{len(errors):,} tasks failed, of {len(missing):,} shard jobs; gpt2 status lists them")
        raise errors[0]
    say("tokenise", f"{total:,} of {total:,} shards done, {len(missing):,} made now")


def _retry_command(config: RunConfig) -> str:
    """What a user types to run what failed again: another attempt of this very run, or the console's own verb."""
    try:
        with get_client(sync_client=True) as client:
            asked = client.read_flow_run(UUID(flow_run.root_flow_run_id))
    except httpx.HTTPError:  # what is shown decides nothing
        return f"gpt2 retry {config.data.dataset}"
    if asked.deployment_id is not None:
        return f"prefect flow-run retry {asked.id}"
    return f"gpt2 retry {config.name if asked.name == f'pretrain-{config.name}' else config.data.dataset}"


def _name(jobs: list[ShardJob]) -> str:
    """What a task is called: its shard, or the first and the number of them."""
    more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    return f"shard-{jobs[0].shard_id}{more}"


def _show(manifest: Manifest, dataset: str) -> None:
    lines = [
        f"# Dataset {dataset}",
        f"manifest `{manifest.digest}`",
        "",
        "| split | shards | documents | tokens |",
        "| --- | ---: | ---: | ---: |",
    ]
    for split, sums in manifest.totals.items():
        lines.append(f"| {split} | {sums['shards']:,} | {sums['documents']:,} | {sums['tokens']:,} |")
    show(
        create_markdown_artifact,
        markdown="\n".join(lines),
        key="dataset-manifest",
        description=f"What {dataset} holds",
    )
