"""The third stage: pin the run, then train it in separate processes, from its newest checkpoint."""

import contextvars
import threading
import time
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage

from prefect import flow, get_run_logger
from prefect.events import emit_event

from flows.handoffs import DatasetVersion
from flows.inspection.alerts import Alerts
from flows.inspection.facts import stored_result
from flows.inspection.plan import plan
from flows.platform.automations import ALERT
from flows.runtime.page import on_page, run_page
from flows.runtime.processes import Processes, run_job
from flows.runtime.progress import Bar, say
from model.checkpoints.records import Progress, StepMetrics, read_metrics
from model.config import RunConfig
from model.runs.job import TrainingResult
from model.runs.run import Run, pin_run, pinned_run, training_job
from storage.datasets.versions import newest_version
from storage.errors import StorageError
from storage.keys import FORMAT, RunKeys
from storage.loading.mix import describe
from storage.stores.opening import open_store
from storage.stores.store import Store, read_as

WATCH_SECONDS = 1.0
train_model = run_job.with_options(name="train_model", task_run_name="train-{job.run}")


@flow(name="train", flow_run_name="train-{config.name}", validate_parameters=False)
def train(config: RunConfig, version: DatasetVersion | None = None) -> TrainingResult:
    """Train the run to its last step. Without `version`, a new run takes the dataset's newest version."""
    with on_page(config, "train"), Bar("train", config.train.max_steps, "steps") as bar:
        store = open_store(config.store_url)
        run = started_run(store, config, version)
        job = training_job(run)
        run_page().plan = plan(config)  # with the dataset's tokens
        if run.mix:
            say("train", f"the weights of train.mix, normalised: {describe(run.mix)}")
        is_done = stored_result(store, job) is not None
        ended = threading.Event()
        context = contextvars.copy_context()  # without it the thread's artifacts belong to no flow run
        watch = (_watch, store, run, bar, Alerts(config), ended)
        watcher = threading.Thread(target=context.run, args=watch, daemon=True)
        watcher.start()
        try:
            with Processes(config.store_url) as processes:
                if config.resources.tracker and not is_done:
                    processes.start_tracker(run.name, config.resources.tracker, get_run_logger().info)
                if config.resources.nodes > 1:
                    say("train", f"on each of the other hosts ({config.resources.nodes - 1}), install this package, "
                                 f"then run python -m model {config.store_url} {job.key}")  # fmt: skip
                result = TrainingResult(**train_model.submit(job, processes).result())
            bar.to(result.step)
        finally:
            ended.set()
            watcher.join()
        run_page().metrics = metrics = read_metrics(store, run.name)
        say("train", _summary(result.step, config.train.max_steps, metrics, done_before=is_done))
        return result


def started_run(store: Store, config: RunConfig, version: DatasetVersion | None = None) -> Run:
    """The run that `config` names. A new run is pinned to `version`, or to the dataset's newest version."""
    if (run := pinned_run(store, config)) is not None:
        return run
    if version is None:
        manifest = newest_version(store, config.data.dataset)
        version = DatasetVersion(manifest.digest, manifest.origin.get("commit"), None)
    return pin_run(store, config, version.manifest, version.items, version.commit)


def _summary(step: int, max_steps: int, metrics: list[StepMetrics], *, done_before: bool) -> str:
    """The training in one line. A skipped step's loss may be NaN, which the metrics hold as None."""
    losses = [line.loss for line in metrics if line.loss is not None]
    skipped = sum(line.skipped for line in metrics)
    done = "already done" if done_before else "done"
    outliers = f", {skipped} outlier steps skipped" if skipped else ""
    val_losses = [(line.val_loss, line.step + 1) for line in metrics if line.val_loss is not None]
    lowest, best = min(val_losses, default=(0.0, 0))
    early = f", ended early: no val loss below {lowest:.4f} since step {best:,}" if step < max_steps else ""
    return f"{step:,} of {max_steps:,} steps {done}: loss {losses[0]:.4f} → {losses[-1]:.4f}{outliers}{early}"


def _watch(store: Store, run: Run, bar: Bar, alerts: Alerts, ended: threading.Event) -> None:
    """Follow the trainer's progress object until training ends: move the bar, hand the page its curve, send alerts."""
    shown = run_page()
    disk = (store.local_path(FORMAT) or Path.cwd() / FORMAT).parent
    saved_at, saved_step = time.monotonic(), -1
    lines_by_step: dict[int, StepMetrics] = {}
    while not ended.wait(WATCH_SECONDS):
        lines = []
        with suppress(StorageError, ValueError):  # the trainer reports the error, and keeps training
            progress = read_as(store, RunKeys(run.name).progress, Progress)
            lines = progress.since_checkpoint if progress else []
            if not lines_by_step:  # the steps before a restart, whose alerts were sent
                lines_by_step = {line.step: line for line in read_metrics(store, run.name)}
                alerts.after([*lines_by_step.values(), *lines])
        if lines:
            loss = "NaN" if lines[-1].loss is None else f"{lines[-1].loss:.3f}"
            bar.to(lines[-1].step + 1, f"loss {loss}  {lines[-1].tokens_per_second:,.0f} tokens/s")
            lines_by_step |= {line.step: line for line in lines}
            shown.metrics = [lines_by_step[step] for step in sorted(lines_by_step)]
            if lines[0].step != saved_step:
                saved_step, saved_at = lines[0].step, time.monotonic()
        for alert in alerts.after(lines) + alerts.at(time.monotonic() - saved_at, disk_usage(disk).free):
            say("train", f"alert: {alert}")
            shown.alerts.append(alert)
            emit_event(ALERT, {"prefect.resource.id": f"run.{run.name}"}, payload={"run": run.name, "alert": alert})
