"""The fourth stage: evaluates checkpoints. Each evaluation is a Prefect task and a job in its own process."""

from typing import Any

from prefect import State, flow
from prefect.artifacts import create_table_artifact
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.items import mirror_items
from flows.runtime.page import run_page
from flows.runtime.processes import Processes, run_job
from flows.runtime.progress import Bar, say, show
from model.checkpoints.records import CheckpointRecord, chosen
from model.config import RunConfig, differences
from model.runs.job import EvaluationSummary, Job, JobFailed, JobRefused, TrainingResult
from model.runs.run import evaluation_jobs, pinned_items, pinned_run
from storage.datasets.manifest import latest_manifest
from storage.errors import StorageError
from storage.stores.opening import open_store
from storage.stores.store import Store

Futures = list[PrefectFuture[Any]]
Failure = tuple[str, Exception]  # the evaluation, and why it failed
evaluate_checkpoint = run_job.with_options(name="evaluate_checkpoint", task_run_name="{job.kind}-{job.recipe[step]}")


@flow(name="evaluate", flow_run_name="evaluate-{config.name}", validate_parameters=False)
def evaluate_flow(config: RunConfig, after: TrainingResult | None) -> list[EvaluationSummary]:  # noqa: ARG001  # the stage to wait for
    """Run the configured evaluations. After all of them, raises JobRefused or JobFailed with every failure."""
    store = open_store(config.store_url)
    records = chosen(store, config.name, config.evaluation.checkpoint)
    manifest, items = _inputs(store, config, records[-1])
    failures: list[Failure] = []
    if config.evaluation.hellaswag and items is None:
        try:
            items = mirror_items(config.evaluation.hellaswag, config.store_url)
        except (ValueError, StorageError) as error:
            failures.append(("hellaswag", error))
    jobs = [job for record in records for job in evaluation_jobs(config, record, manifest, items)]
    with Bar("evaluate", len(jobs), "evaluations") as bar, Processes(config.store_url) as processes:
        futures: Futures = [evaluate_checkpoint.submit(job, processes) for job in jobs]
        for _ in as_completed(futures):
            bar.advance()
    return _results(config.name, jobs, futures, failures)


def evaluate(config: RunConfig, trained: TrainingResult | None) -> State[list[EvaluationSummary]]:
    """Run the stage, `resources.concurrent_evaluations` evaluations at a time. Returns its final state."""
    runner: Any = ThreadPoolTaskRunner(config.resources.concurrent_evaluations)
    return evaluate_flow.with_options(task_runner=runner)(config, trained, return_state=True)


def _results(run: str, jobs: list[Job], futures: Futures, failures: list[Failure]) -> list[EvaluationSummary]:
    """Return the results, and show them as a table in Prefect's UI. Raises JobFailed or JobRefused for any failure."""
    rows = [{"evaluation": name, "step": "", "state": "Failed", "result": str(error)[:300]} for name, error in failures]
    results = []
    for job, future in zip(jobs, futures, strict=True):
        row = {"evaluation": job.kind, "step": job.recipe["step"]}
        try:
            result = EvaluationSummary(**future.result())
        except (JobFailed, ValueError, StorageError) as error:
            failures.append((f"{job.kind} of step {row['step']:,}", error))
            rows.append(row | {"state": "Failed", "result": str(error)[:300]})
        else:
            results.append(result)
            metrics = [f"{name} {value:.4f}" for name, value in result.metrics.items()]
            rows += [row | {"state": str(future.state.name), "result": metric} for metric in metrics or [""]]
    show(create_table_artifact, table=rows, key="evaluations", description=f"Evaluations of {run}")
    run_page().show("Failed evaluations", [row for row in rows if row["state"] == "Failed"])
    for name, reason in failures:
        say("evaluate", f"{name} failed: {str(reason).partition(chr(10))[0]}")
    computed = sum(future.state.name == "Completed" for future in futures)  # else Skipped or Failed
    say("evaluate", f"{len(results)} of {len(results) + len(failures)} evaluations done, {computed} computed now")
    if failures:
        kind = JobFailed if any(isinstance(error, JobFailed) for _, error in failures) else JobRefused
        raise kind("\n".join(f"{name}: {error}" for name, error in failures))
    return results


def _inputs(store: Store, config: RunConfig, record: CheckpointRecord) -> tuple[str | None, str | None]:
    """The manifest (None: no dataset) and the key of HellaSwag's items (None: not mirrored), pinned or newest."""
    if run := pinned_run(store, config):
        return run.manifest, pinned_items(run, config)
    if differing := differences(config.model.model_dump(mode="json"), record.model, "model"):
        raise ValueError(f"imported run {config.name!r}: {'; '.join(differing)}. Use the imported model's settings.")
    if (newest := latest_manifest(store, config.data.dataset)) is None:
        remedy = "Build it with gpt2 dataset build, or choose another with --set data.dataset=NAME"
        say("evaluate", f"no dataset {config.data.dataset!r} in {store.url!r}, so there is no val loss. {remedy}")
        return None, None
    return newest.digest, None
