"""The fourth stage: fan out the evaluations of checkpoints, each a tracked task and a job of its own process."""

from pathlib import Path
from typing import Any

from prefect import State, flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows.handoffs import Evaluated, Trained
from flows.items import mirror_items
from flows.runtime.artifacts import show
from flows.runtime.processes import Processes, run_job
from flows.runtime.progress import Bar, say
from model.checkpoints.records import CheckpointRecord, checkpoints
from model.config import EvaluationConfig, RunConfig, differences
from model.runs.job import Job, JobFailed, JobRefused
from model.runs.run import evaluation_jobs, pinned_run
from storage.datasets.manifest import latest_manifest
from storage.errors import ObjectMissing, StorageError
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, read_json


@task(task_run_name="{job.kind}-{job.recipe[step]}", cache_policy=NO_CACHE)
def evaluate_checkpoint(job: Job, store_url: str, processes: Processes) -> Any:
    """Wait for one evaluation's process. Returns its result: name, metrics and the key of all that was found."""
    store = open_store(store_url)
    kept = read_json(store, RunKeys(job.run).evaluation(job.recipe["step"], job.kind))
    if kept is None or kept.get("job") != job.job_id:
        store.delete(RunKeys(job.run).result(job.job_id))  # asked otherwise since: what it found was overwritten
    return run_job(store, job, processes)


@flow(name="evaluate", flow_run_name="evaluate-{config.name}", validate_parameters=False)
def evaluate_flow(config: RunConfig, after: Trained | None) -> Evaluated:  # noqa: ARG001  # what it waits for
    """Evaluate the checkpoints that are asked for. One failing evaluation leaves the others.

    Raises JobRefused or JobFailed, with every failure in its message, after all have ended.
    """
    store = open_store(config.store_url)
    kept = chosen(store, config.name, config.evaluation)
    manifest, items = _data(store, config, kept[-1])
    failures: list[tuple[str, Exception]] = []
    if config.evaluation.hellaswag and items is None:
        try:
            items = mirror_items(config.evaluation.hellaswag, config.store_url)
        except (ValueError, StorageError) as error:
            failures.append(("hellaswag", error))
    jobs = [job for record in kept for job in evaluation_jobs(config, record, manifest, items)]
    bar = Bar("evaluate", len(jobs), "evaluations")
    with Processes(config.store_url) as processes:
        futures: list[PrefectFuture[Any]] = [
            evaluate_checkpoint.submit(job, config.store_url, processes) for job in jobs
        ]
        for future in futures:
            future.add_done_callback(lambda _: bar.advance())
        wait(futures)
    bar.close()
    return Evaluated(_answers(config.name, jobs, futures, failures))


def evaluate(config: RunConfig, trained: Trained | None) -> State[Evaluated]:
    """Run the stage with at most `resources.concurrent_evaluations` at once. Returns the state that it ended in."""
    runner: Any = ThreadPoolTaskRunner(config.resources.concurrent_evaluations)
    state: State[Evaluated] = evaluate_flow.with_options(task_runner=runner)(config, trained, return_state=True)
    return state


def _answers(
    run: str, jobs: list[Job], futures: list[PrefectFuture[Any]], failures: list[tuple[str, Exception]]
) -> list[dict[str, Any]]:
    """What each evaluation answered, as a table in Prefect's UI too; raises when one failed, or `failures` has one."""
    rows = [{"evaluation": name, "step": "", "state": "Failed", "found": [str(why)]} for name, why in failures]
    results = []
    for job, future in zip(jobs, futures, strict=True):
        row = {"evaluation": job.kind, "step": job.recipe["step"]}
        try:
            result = future.result()
        except (JobFailed, ValueError, StorageError) as error:
            failures.append((f"{job.kind} of step {job.recipe['step']:,}", error))
            rows.append(row | {"state": "Failed", "found": [str(error)]})
        else:
            results.append(result)
            found = [f"{name} {value:.4f}" for name, value in result["metrics"].items()]
            rows.append(row | {"state": str(future.state.name), "found": found or [""]})
    shown = [row | {"found": line[:300]} for row in rows for line in row["found"]]
    show(create_table_artifact, table=shown, key="evaluations", description=f"Evaluations of {run}")
    for name, why in failures:
        say("evaluate", f"{name} failed: {why}")
    made = sum(row["state"] == "Completed" for row in rows)
    say("evaluate", f"{len(results)} of {len(rows)} evaluations done, {made} made now")
    if failures:
        said = "\n".join(f"{name}: {why}" for name, why in failures)
        raise JobFailed(said) if any(isinstance(why, JobFailed) for _, why in failures) else JobRefused(said)
    return results


def chosen(store: Store, run: str, asked: EvaluationConfig) -> list[CheckpointRecord]:
    """The checkpoints that `evaluation.checkpoint` names, oldest first. Raises ObjectMissing when there is none."""
    kept = checkpoints(store, run)
    named = {"last": kept[-1:], "every": kept}
    found = named.get(asked.checkpoint) or [record for record in kept if str(record.step) == asked.checkpoint]
    if not found:
        steps = ", ".join(f"{record.step:,}" for record in kept)
        there = f"those of steps {steps}. Give one of these" if kept else "none of it. Train it first: gpt2 train"
        raise ObjectMissing(
            f"run {run!r}: checkpoint {asked.checkpoint!r} (evaluation.checkpoint) was asked for, store {store.url!r} "
            f"has {there}"
        )
    return found


def _data(store: Store, config: RunConfig, record: CheckpointRecord) -> tuple[str | None, str | None]:
    """The dataset's version to ask about and the key of HellaSwag items, None for what is not at hand.

    Those that the run is pinned to; a model that was imported takes the newest version there is.
    """
    run = pinned_run(store, config)
    if run is not None:
        asked = config.evaluation.hellaswag
        # A file on this host is read anew: it may have been mended. One that has gone is in the store.
        kept = run.config["evaluation"]["hellaswag"] == asked and not Path(asked).is_file()
        return run.manifest, run.items if kept else None
    if differing := differences(config.model.model_dump(mode="json"), record.model):
        raise ValueError(f"run {config.name!r}: {'; '.join(differing)}. Give the settings that it was imported with.")
    newest = latest_manifest(store, config.data.dataset)
    if newest is None:
        say("evaluate", f"dataset {config.data.dataset!r} has no version here, so there is no val loss. "
                        f"gpt2 dataset build makes one; --set data.dataset=NAME names another")  # fmt: skip
    return (newest.digest if newest else None), None
