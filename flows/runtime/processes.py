"""Starts, logs and stops the training and evaluation processes of a flow run.

    task's thread: run_job ──▶ Processes.run ──▶ python -m model STORE JOB ──▶ result in the store
    main thread:   with Processes(…): wait for the tasks; leaving the block stops every process

Linux signals a child when the *thread* that started it ends (prctl(2)), so the task's thread also waits for it.
Prefect raises a cancellation in the main thread, which then leaves the block.
"""

import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from flows.inspection.facts import stored_result
from flows.platform.server import stop
from model.runs.job import USER_ERROR, Job, JobFailed, JobRefused, note_failure, put_job, read_result
from storage.errors import printable
from storage.keys import RunKeys
from storage.stores.opening import open_store

GRACE_SECONDS = 8.0  # for a last checkpoint: Prefect expects a cancelled run to end within 10 s
TAIL_LINES = 40
LOG_SECONDS = 10.0  # each logged line is a row in Prefect's database: about 2,000 for a run of 6 hours
# The variables that a process with the trainer's credentials inherits, by how their names begin.
INHERITED = (
    "PATH", "HOME", "LANG", "LC_", "TZ", "PYTHON", "VIRTUAL_ENV", "LD_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_",
    "CUDA_", "CUBLAS_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "GOMP_", "KMP_", "MKL_",
)  # fmt: skip
TRACKERS = ("TRACKIO_", "WANDB_", "MLFLOW_", "HF_")  # addresses and secrets of trackers, which a trainer never gets


class Processes(AbstractContextManager["Processes"]):
    """The processes of one flow run. Leaving the block stops the running processes and their process groups."""

    def __init__(self, store_url: str) -> None:
        self.store_url = store_url
        self._lock = threading.Lock()  # a process is either started before the block ends or not at all
        self._started: list[subprocess.Popen[str]] = []
        self._closed = False

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
        stop([process for process in self._started if process.poll() is None], GRACE_SECONDS)

    def start_tracker(self, run: str, tracker: str, log: Callable[[str], None]) -> None:
        """Send the run's metrics to a tracker while the block lasts. A failure of the tracker is a line in the log."""
        argv = [sys.executable, "-m", "model.tracking", self.store_url, run, *tracker.split(":", 1)]
        process = _start([*argv, "--parent", str(os.getpid())], _environment(TRACKERS))  # trainers must not read these
        self._started.append(process)

        def follow() -> None:
            with process:  # closes its output, and waits
                _log_output(process.stdout or (), log)
            if process.returncode < 0 and not self._closed:
                log(f"the tracker's process was killed, signal {-process.returncode}. The training goes on without it.")

        threading.Thread(target=follow, daemon=True).start()

    def run(self, job_key: str, log: Callable[[str], None]) -> None:
        """Run the job to its end in a task's thread. Raises JobRefused (exit code 2) or JobFailed (other failures)."""
        argv = [sys.executable, "-m", "model", self.store_url, job_key, "--parent", str(os.getpid())]
        with self._lock:
            if self._closed:
                raise JobFailed(f"job {job_key!r} was not started: the flow is ending. Run the same command again.")
            process = _start([*_as_trainer(), *argv], _environment())
            self._started.append(process)
        assert process.stdout is not None
        with process.stdout as output:
            tail, errors = _log_output(output, log)
        code = process.wait()
        if code == USER_ERROR:
            raise JobRefused("\n".join(errors or tail))
        if code:
            hint = ", often out of memory" if code == -signal.SIGKILL and not self._closed else ""
            ending = f"was killed, signal {-code}{hint}" if code < 0 else f"ended with exit code {code}"
            errors.sort(key=lambda error: " was killed, " not in error)  # other ranks fail because of the killed rank
            causes, last_lines = "".join(f"{error}: " for error in errors), "\n".join(tail)
            shown = "" if errors else f" The last lines of its output:\n{last_lines}"
            raise JobFailed(f"{causes}job {job_key!r} {ending}. Run the same command again to resume it.{shown}")


@task(cache_policy=NO_CACHE)
def run_job(job: Job, processes: Processes) -> Any:
    """Run a job in its own process, unless done. Returns its result. Raises JobRefused or JobFailed; stores why."""
    store = open_store(processes.store_url)
    if (result := stored_result(store, job)) is not None:
        return Completed(name="Skipped", message="already done", data=result)
    store.delete(RunKeys(job.run).result(job.job_id))  # else the process would take it for done
    try:
        processes.run(put_job(store, job), get_run_logger().info)
        if (result := read_result(store, job)) is None:
            raise JobFailed(f"job {job.job_id!r} was stopped by SIGTERM. Run the same command again to resume it.")
    except (JobFailed, ValueError) as error:
        note_failure(store, RunKeys(job.run).result(job.job_id), str(error))
        raise
    return result


def _start(argv: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        text=True, errors="replace", start_new_session=True, env=environment,
    )  # fmt: skip


def _as_trainer() -> list[str]:
    """The command that starts another as TRAINER_USER, without this process's capabilities: Linux would keep them."""
    if "TRAINER_USER" not in os.environ:
        return []
    user = pwd.getpwnam(os.environ["TRAINER_USER"])
    change = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--no-new-privs"]
    return [*change, "--inh-caps=-all", "--ambient-caps=-all", "env", f"HOME={user.pw_dir}"]


def _environment(more: tuple[str, ...] = ()) -> dict[str, str]:
    """The environment of a process. TRAINER_* credentials, if set, replace the flow's, which may write shards."""
    if not any(name.startswith("TRAINER_") for name in os.environ):
        return dict(os.environ)
    kept = {name: value for name, value in os.environ.items() if name.upper().startswith(INHERITED + more)}
    keys = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
    return kept | {f"AWS_{key}": os.environ[f"TRAINER_{key}"] for key in keys if f"TRAINER_{key}" in os.environ}


def _log_output(output: Iterable[str], log: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """Log a process's output, with at most one step line per LOG_SECONDS. Returns its last lines and its errors."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    errors: dict[str, None] = {}  # a dict drops repetitions: every rank may print the same error
    logged_at = 0.0
    for line in (printable(line.rstrip()) for line in output):
        tail.append(line)
        if line.startswith("error: "):
            errors[line.removeprefix("error: ")] = None
        if not line.startswith("step ") or time.monotonic() - logged_at > LOG_SECONDS:
            logged_at = time.monotonic()
            log(line)
    return list(tail), list(errors)
