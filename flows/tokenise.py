"""The second stage: plan the shards, run just the jobs that are missing, seal the manifest."""

import os
from collections import deque
from dataclasses import dataclass
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.download import Downloaded
from flows.progress import Bar, say
from model import tokenizer
from model.config import DataConfig, ResourcesConfig, RunConfig
from model.job import note_failure
from model.run import Run, pinned_run
from storage import keys, shards
from storage.errors import DatasetMismatch, StorageError, StoreUnavailable
from storage.layout import open_store
from storage.lease import claim
from storage.manifest import Manifest, check_binding, check_rebuilt, latest_manifest, read_manifest, seal
from storage.plan import ShardJob, plan
from storage.store import Store

IN_FLIGHT = 4  # jobs submitted a worker: enough to keep all busy, few enough to keep the flow small


@dataclass(frozen=True)
class DatasetVersion:
    """A sealed manifest's digest, and the key of the HellaSwag items that came with the source."""

    manifest: str
    items: str | None


def transient(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a failed shard job is worth another try: what the disk or the network did, never bad data."""
    return isinstance(state.result(raise_on_failure=False), OSError | StoreUnavailable)


@task(
    task_run_name="shard-{job.shard_id}",
    cache_policy=NO_CACHE,  # Prefect's cache says `Cached` even when the data is gone; the record is the truth
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_jitter_factor=0.5,
    retry_condition_fn=transient,
)
def tokenise_shard(job: ShardJob, dataset: str, store_url: str) -> Any:
    """Make one shard and its record, or find them."""
    store = open_store(store_url)
    if shards.is_done(store, dataset, job.shard_id):
        return Completed(name="Skipped", message="its record was there")
    try:
        record = shards.build_shard(store, dataset, job, tokenizer.encode, tokenizer.EOT)
    except (ValueError, StorageError) as error:
        note_failure(store, keys.record(dataset, job.shard_id), str(error))
        raise
    store.delete(keys.failure(keys.record(dataset, job.shard_id)))
    get_run_logger().info("%s: %s tokens of %s documents", job.shard_id, f"{record.tokens:,}", f"{record.documents:,}")
    return record.tokens


@task(task_run_name="seal-{data.dataset}", cache_policy=NO_CACHE)
def seal_dataset(planned: list[str], data: DataConfig, store_url: str) -> Manifest:
    """Write the manifest of all planned shards and point `latest` at it."""
    return seal(
        open_store(store_url),
        data.dataset,
        planned,
        recipe=dataset_recipe(data),
        tokenizer=tokenizer.identity(),
        binding=dataset_binding(data),
        val_shards=data.val_shards,
    )


@flow(name="tokenise", flow_run_name="tokenise-{config.data.dataset}", validate_parameters=False)
def tokenise_flow(config: RunConfig, downloaded: Downloaded) -> DatasetVersion:
    """Bring the dataset to the state the sources ask for."""
    store = open_store(config.store_url, create=True)
    run = pinned_run(store, config)
    manifest = _mend(store, config, run, downloaded) if run else _build(store, config, downloaded)
    _show(manifest, config.data.dataset)
    return DatasetVersion(manifest.digest, downloaded.items)


def tokenise(config: RunConfig, downloaded: Downloaded) -> DatasetVersion:
    """Run the stage on the task runner that `resources.runner` names."""
    return tokenise_flow.with_options(task_runner=task_runner(config.resources))(config, downloaded)


def task_runner(resources: ResourcesConfig) -> TaskRunner[Any]:
    """What runs the shard jobs: the same task code and the same bytes under each."""
    workers = resources.workers or (os.cpu_count() or 1)
    return ProcessPoolTaskRunner(workers) if resources.runner == "processes" else ThreadPoolTaskRunner(workers)


def dataset_recipe(data: DataConfig) -> dict[str, Any]:
    """What decides a dataset's bytes beside its source files; a default that is younger than a dataset stays out."""
    recipe: dict[str, Any] = {"shard_tokens": data.shard_tokens, "tokenizer": tokenizer.identity()["sha256"]}
    if data.text_column != "text":
        recipe["text_column"] = data.text_column
    return recipe


def dataset_binding(data: DataConfig) -> dict[str, Any]:
    """What a dataset's name is bound to at its first seal."""
    return dataset_recipe(data) | {"source": data.source, "config": data.config}


def _build(store: Store, config: RunConfig, downloaded: Downloaded) -> Manifest:
    """Make what the sources need and the store lacks, then seal; nothing new gives no new version."""
    data = config.data
    check_binding(store, data.dataset, dataset_binding(data))
    jobs = _plan(data, downloaded)
    if len(jobs) <= data.val_shards:
        raise ValueError(
            f"data.val_shards = {data.val_shards}: the source gives {len(jobs)} shards of up to {data.shard_tokens:,} "
            f"tokens, so none would be left to train on. Use fewer data.val_shards or smaller data.shard_tokens."
        )
    claim(store, data.dataset, "build")  # before anything that is there is counted on
    latest = latest_manifest(store, data.dataset)
    finished = shards.done(store, data.dataset, [job.shard_id for job in jobs], latest.known_tokens if latest else {})
    missing = [job for job in jobs if job.shard_id not in finished]
    _run_missing(config, missing, len(jobs))
    if latest:
        check_rebuilt(store, data.dataset, latest, {job.shard_id for job in missing})
    manifest = seal_dataset([job.shard_id for job in jobs], data, config.store_url)
    pinned = f"manifest {manifest.digest[:12]}"
    say("tokenise", f"{pinned} is unchanged" if latest and latest.digest == manifest.digest else f"sealed {pinned}")
    return manifest


def _mend(store: Store, config: RunConfig, run: Run, downloaded: Downloaded) -> Manifest:
    """Make again just the shards of the run's manifest that the store has lost; a pinned run gets no new version."""
    manifest = read_manifest(store, run.dataset, run.manifest)
    finished = shards.done(store, run.dataset, manifest.shard_ids, manifest.known_tokens)
    lost = set(manifest.shard_ids) - finished
    jobs = [job for job in _plan(config.data, downloaded) if job.shard_id in lost] if lost else []
    if len(jobs) < len(lost):
        raise DatasetMismatch(
            f"run {run.name!r} needs {len(lost):,} lost shards of manifest {run.manifest[:12]}, the source gives "
            f"{len(jobs):,} of them: it has changed. Put the old source files back, or start a run of another name."
        )
    _run_missing(config, jobs, len(manifest.shard_ids))
    check_rebuilt(store, run.dataset, manifest, lost)
    return manifest


def _plan(data: DataConfig, downloaded: Downloaded) -> list[ShardJob]:
    digest = tokenizer.identity()["sha256"]
    jobs = list(
        plan(downloaded.files, shard_tokens=data.shard_tokens, text_column=data.text_column, tokenizer_digest=digest)
    )
    if not jobs:
        raise ValueError(
            f"data.source = {data.source!r}: documents were asked for, found {len(downloaded.files)} files without a "
            f"single row. Give files that hold text."
        )
    return jobs


def _run_missing(config: RunConfig, missing: list[ShardJob], total: int) -> None:
    """Submit the jobs that are missing of `total`, a window at a time, and show what became of each."""
    dataset = config.data.dataset
    say("tokenise", f"{total - len(missing):,} of {total:,} shards done")
    if not missing:
        return
    bar = Bar("tokenise", len(missing), "shards")
    window = IN_FLIGHT * (config.resources.workers or (os.cpu_count() or 1))
    rows: list[dict[str, Any]] = [{"shard": f"{total - len(missing):,} others", "state": "Done before", "why": ""}]
    errors: list[BaseException] = []
    pending: deque[tuple[ShardJob, PrefectFuture[Any]]] = deque()
    for job in [*missing, None]:
        while pending and (job is None or len(pending) >= window):
            _settle(*pending.popleft(), rows, errors)
            bar.advance()
        if job is not None:
            pending.append((job, tokenise_shard.submit(job, dataset, config.store_url)))
    bar.close()
    create_table_artifact(rows, key="shard-status", description=f"Shard jobs of {dataset}")
    if errors:
        if len(errors) > 1:
            say("tokenise", f"{len(errors):,} of {len(missing):,} shard jobs failed; gpt2 status lists them")
        raise errors[0]
    say("tokenise", f"{total:,} of {total:,} shards done, {len(missing):,} made now")


def _settle(job: ShardJob, future: PrefectFuture[Any], rows: list[dict[str, Any]], errors: list[BaseException]) -> None:
    future.wait()
    state = future.state
    why = ""
    if not state.is_completed():
        error = state.result(raise_on_failure=False)
        errors.append(error if isinstance(error, BaseException) else RuntimeError(str(state.message)))
        why = str(errors[-1])
    rows.append({"shard": job.shard_id, "state": state.name, "why": why[:300]})


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
    create_markdown_artifact("\n".join(lines), key="dataset-manifest", description=f"What {dataset} holds")
