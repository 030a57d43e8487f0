"""Answers from the store alone when nothing is left to do: such a command needs no Prefect."""

from contextlib import suppress

from flows.handoffs import Reported
from flows.inspection.facts import run_facts, stored_result
from model import tokenizer
from model.checkpoints.records import chosen
from model.config import RunConfig
from model.runs.job import EvaluationSummary
from model.runs.run import evaluation_jobs, pinned_items, pinned_run, training_job
from storage.datasets import building
from storage.datasets.manifest import Manifest, read_manifest
from storage.datasets.plan import FilePlan, plan_files
from storage.datasets.records import finished_shards
from storage.errors import ObjectMissing, StorageError
from storage.inspection.leaks import read_leak_report
from storage.keys import DatasetKeys, RunKeys
from storage.sources.files import SourceFile
from storage.sources.mirror import list_source
from storage.stores.store import Store


def finished_run(store: Store, config: RunConfig) -> Reported | None:
    """What `pretrain` returns for a run whose stages are all done, or None. Raises DatasetMismatch as `pinned_run`."""
    run = pinned_run(store, config)
    if run is None:
        return None
    with suppress(StorageError):  # the flow repairs what is damaged or missing, or says what is wrong
        manifest = read_manifest(store, run.dataset, run.manifest)
        shards = finished_shards(store, run.dataset, manifest.shard_ids, manifest.rows_by_id)
        items = pinned_items(run, config)
        lacks_items = bool(config.evaluation.hellaswag) and items is None
        lacks_audit = config.resources.audit and read_leak_report(store, run.dataset, run.manifest) is None
        if len(shards) < len(manifest.shard_ids) or lacks_items or lacks_audit:
            return None
        records = chosen(store, run.name, config.evaluation.checkpoint)
        jobs = [job for record in records for job in evaluation_jobs(config, record, run.manifest, items)]
        trained, *evaluated = (stored_result(store, job) for job in [training_job(run), *jobs])
        evaluations = [EvaluationSummary(**result) for result in evaluated if result]
        keys = RunKeys(run.name)
        written_at = min(store.stat(keys.report(suffix)).modified for suffix in ("html", "md"))
        changed_at = (store.stat(keys.evaluation(job.recipe["step"], job.kind)).modified for job in jobs)
        if trained and len(evaluations) == len(jobs) and max(changed_at) <= written_at:
            return Reported.of(run_facts(store, run.name), evaluations)
    return None


def finished_dataset(store: Store, config: RunConfig) -> Manifest | None:
    """The version that `dataset build` would return, sealed if only that was missing; None if there is more to do."""
    data, spec = config.data, config.data.spec(tokenizer.identity())
    if config.resources.audit or not any(store.list(DatasetKeys(data.dataset).latest)):
        return None

    def missing(file: SourceFile, _: int) -> FilePlan:
        raise ObjectMissing(file.name)

    with suppress(ObjectMissing):
        listing, outdated = list_source(store, data.source, data.config, data.revision, "train", filters=data.filters)
        plans = list(plan_files(store, data.dataset, listing.files, spec.settings, missing))
        build = building.start_build(store, spec, plans)
        if not (build.missing or outdated):
            return building.finish_build(store, build, listing.origin)
    return None
