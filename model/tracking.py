"""Sends the metrics of a run to an experiment tracker: python -m model.tracking STORE_URL RUN TRACKER [TARGET].

The trainer only writes to the store and does not know of trackers, so one that hangs, refuses or dies costs it nothing.
This process ends after the run's last step, or after one last pass at SIGTERM. Started again, it continues the curve.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from model.checkpoints.records import Progress, read_metrics
from model.processes.output import drop_failing_output, fail
from model.processes.parent import end_with_parent
from model.runs.job import read_result
from model.runs.run import find_run, training_job
from storage.errors import ObjectMissing, StorageError
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, read_as

EVERY_SECONDS = 3.0  # the trainer stores its progress every 10 s
PROJECT = "gpt2"
LEFT_OUT = {"step", "skipped", "val_losses", "epochs", "step_seconds", "metrics_seconds"}

# The number of steps that the tracker has; a function that adds numbers by name at a step; a function that ends.
Curve = tuple[int, Callable[[dict[str, float], int], object], Callable[[], object]]


def _trackio(project: str, run: str) -> Curve:
    import trackio

    tracked = trackio.init(project or PROJECT, name=run, resume="allow")
    return tracked._next_step - 1, tracked.log, tracked.finish


def _wandb(project: str, run: str) -> Curve:
    import wandb

    tracked = wandb.init(project=project or PROJECT, id=run, name=run, resume="allow")
    return tracked.step - 1, tracked.log, tracked.finish


def _mlflow(address: str, run: str) -> Curve:
    import mlflow

    mlflow.set_tracking_uri(address or mlflow.get_tracking_uri())  # MLFLOW_TRACKING_URI, or a file in this folder
    mlflow.set_experiment(PROJECT)
    runs = mlflow.search_runs(filter_string=f"run_name = '{run}'", max_results=1, output_format="list")
    tracked = mlflow.start_run(runs[0].info.run_id if runs else None, run_name=run)
    history = mlflow.MlflowClient().get_metric_history(tracked.info.run_id, "learning_rate")  # which every step has
    return max((point.step for point in history), default=0), mlflow.log_metrics, mlflow.end_run


def _tensorboard(folder: str, run: str) -> Curve:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(f"{folder or 'tensorboard'}/{run}", purge_step=1, flush_secs=5)

    def add(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return 0, add, writer.close  # all steps are written again, in place of an earlier process's


TRACKERS = {"trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow, "tensorboard": _tensorboard}


def follow(store: Store, run: str, tracker: str, target: str, signals: SimpleQueue[int]) -> None:
    """Send each step once, in order, until the training has its result; after a signal, send once more and end."""
    if (pinned := find_run(store, run)) is None:
        raise ObjectMissing(f"store {store.url!r} has no run {run!r}. gpt2 status lists the runs.")
    sent_steps, add, close = TRACKERS[tracker](target, run)
    is_last = False
    while not is_last:
        with suppress(Empty):
            is_last = bool(signals.get(timeout=EVERY_SECONDS))
        with suppress(StorageError):  # the trainer reports the error, and keeps training
            is_done = read_result(store, training_job(pinned)) is not None
            progress = read_as(store, RunKeys(run).progress, Progress)
            lines = progress.since_checkpoint if progress else []
            if is_done or not lines or lines[0].step > sent_steps:  # a checkpoint has the steps in between
                lines = [*read_metrics(store, run), *lines]
            for line in lines:
                if line.step >= sent_steps:
                    val_losses = {f"val_loss/{dataset}": loss for dataset, loss in line.val_losses.items()}
                    add(line.model_dump(exclude=LEFT_OUT, exclude_none=True) | val_losses, line.step + 1)
                    sent_steps = line.step + 1
            is_last |= is_done
    close()


def main() -> int:
    """Follow one run to its end. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.tracking", description="Send a run's metrics to a tracker.")
    parser.add_argument("store_url", help="the store: ./data or s3://bucket/prefix")
    parser.add_argument("run", help="the name of the run")
    parser.add_argument("tracker", choices=TRACKERS)
    parser.add_argument("target", nargs="?", default="", help="project; MLflow: address; TensorBoard: folder")
    parser.add_argument("--parent", type=int, help="end when the parent process with this PID dies")
    args = parser.parse_args()
    drop_failing_output()
    signals: SimpleQueue[int] = SimpleQueue()
    signal.signal(signal.SIGTERM, lambda signum, _: signals.put(signum))
    if args.parent is not None:
        end_with_parent(args.parent, signal.SIGKILL)  # SIGTERM would not end a tracker that hangs
    try:
        follow(open_store(args.store_url), args.run, args.tracker, args.target, signals)
    except Exception as error:  # whatever a tracker's library raises
        reason = str(error).strip().partition("\n")[0]
        return fail(f"{args.tracker} ends, the training goes on: {type(error).__name__}: {reason}", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
