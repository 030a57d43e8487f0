"""The fourth stage: fan out the evaluations of a checkpoint, each a tracked task and a process of its own."""

from dataclasses import dataclass
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectConcurrentFuture
from prefect.task_runners import ThreadPoolTaskRunner

from flows.launch import Processes
from flows.progress import Bar, say
from flows.train import Trained, newest_version, run_job
from model.config import RunConfig, differences
from model.history import checkpoints
from model.job import Job, JobFailed, JobRefused
from model.run import evaluation_jobs, pin_run, pinned_run
from storage.errors import ObjectMissing
from storage.layout import open_store


@dataclass(frozen=True)
class Evaluated:
    """What the evaluations answered."""

    results: list[dict[str, Any]]


@task(task_run_name="{job.kind}", cache_policy=NO_CACHE)
def evaluate_checkpoint(job: Job, store_url: str, processes: Processes) -> Any:
    """Wait for one evaluation's process. Returns its result: name, metrics and the key of all that was found."""
    return run_job(open_store(store_url), job, processes)


@flow(name="evaluate", flow_run_name="evaluate-{config.name}", validate_parameters=False)
def evaluate_flow(config: RunConfig, after: Trained | None) -> Evaluated:  # noqa: ARG001  # what it waits for
    """Evaluate the newest checkpoint. One failing evaluation leaves the others; raises after all have ended."""
    store = open_store(config.store_url)
    run = pinned_run(store, config)
    kept = checkpoints(store, config.name)
    if not kept:
        raise ObjectMissing(
            f"run {config.name!r}: a checkpoint was asked for, store {config.store_url!r} has none. "
            f"Train it first: gpt2 train"
        )
    if run is None:  # an imported model, which no training has pinned
        if differing := differences(config.model.model_dump(mode="json"), kept[-1].model):
            raise ValueError(
                f"run {config.name!r}: {'; '.join(differing)}. Give the settings that it was imported with."
            )
        version = newest_version(store, config)
        run = pin_run(store, config, version.manifest, version.items, version.commit)
    jobs = evaluation_jobs(run, kept[-1].step)
    bar = Bar("evaluate", len(jobs), "evaluations")
    with Processes(config.store_url) as processes:
        futures: list[PrefectConcurrentFuture[Any]] = [
            evaluate_checkpoint.submit(job, config.store_url, processes)  # type: ignore[misc]  # a thread runner's future
            for job in jobs
        ]
        for future in futures:
            future.wrapped_future.add_done_callback(lambda _: bar.advance())
        processes.serve(futures)
    bar.close()
    results, rows, failed = [], [], []
    for job, future in zip(jobs, futures, strict=True):
        try:
            result = future.result()
        except (JobFailed, JobRefused) as error:
            failed.append(error)
            rows.append({"evaluation": job.kind, "state": "Failed", "metrics": str(error)[:300]})
            say("evaluate", f"{job.kind} failed: {error}")
        else:
            results.append(result)
            metrics = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
            rows.append({"evaluation": job.kind, "state": str(future.state.name), "metrics": metrics})
    create_table_artifact(rows, key="evaluations", description=f"Evaluations of {run.name} at step {kept[-1].step:,}")
    if failed:
        raise failed[0]
    before = sum(row["state"] == "Skipped" for row in rows)
    say("evaluate", f"{len(jobs)} of {len(jobs)} evaluations done, {len(jobs) - before} made now")
    return Evaluated(results)


def evaluate(config: RunConfig, trained: Trained | None) -> Evaluated:
    """Run the stage with at most `resources.concurrent_evaluations` processes at once."""
    runner: Any = ThreadPoolTaskRunner(config.resources.concurrent_evaluations)
    return evaluate_flow.with_options(task_runner=runner)(config, trained)
