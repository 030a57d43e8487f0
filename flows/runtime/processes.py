"""The door to the processes that compute: start one for a job, relay what it says, stop it. Knows no job's contents.

Prefect raises a cancellation in the flow's main thread only, and Linux signals a child when the *thread* that started
it ends. So the main thread owns every process: tasks ask and wait, `serve` starts, and leaving the block stops all.

    task thread: run(job) ──request──▶ main thread: serve(futures) ──▶ python -m model … ──▶ result in the store
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from prefect import get_run_logger
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Completed

from model.runs.job import Job, JobFailed, JobRefused, note_failure, put_job, read_result
from storage.keys import RunKeys
from storage.stores.store import Store

USER_ERROR = 2  # exit code of a process that found what a user can mend
GRACE_SECONDS = 8.0  # for a last checkpoint: a cancelled run has 10 s to be gone
TAIL_LINES = 40
LOG_SECONDS = 10.0  # each relayed line is a row in Prefect's database: some 2,000 of a training of 6 hours


def _environment() -> dict[str, str]:
    """What a process that computes is given: the trainer's identity in the store, where TRAINER_* name one.

    It writes its run and reads the rest; the flow's own, which makes shards, and Prefect's password stay here.
    """
    if "TRAINER_ACCESS_KEY_ID" not in os.environ:
        return dict(os.environ)
    hidden = ("TRAINER_", "PREFECT_", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    names = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
    return kept | {f"AWS_{name}": os.environ[f"TRAINER_{name}"] for name in names}


class _Request:
    """One process that a task waits for."""

    def __init__(self, words: list[str], log: Callable[[str], None]) -> None:
        self.words, self.log = words, log
        self.process: subprocess.Popen[str] | None = None
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.errors: dict[str, None] = {}  # each once: every rank that meets one says so
        self.ended = threading.Event()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, errors="replace", start_new_session=True, env=_environment(),
        )  # fmt: skip
        threading.Thread(target=self._relay, daemon=True).start()

    def _relay(self) -> None:
        """Keep the last lines, and pass on the log without the steps in between."""
        assert self.process is not None and self.process.stdout is not None
        said = 0.0
        with self.process.stdout as lines:
            for line in lines:
                self.tail.append(line.rstrip())
                if line.startswith("error: "):
                    self.errors[line.rstrip().removeprefix("error: ")] = None
                if not line.startswith("step ") or time.monotonic() - said > LOG_SECONDS:
                    said = time.monotonic()
                    self.log(line.rstrip())
        self.process.wait()
        self.ended.set()

    def stop(self, sign: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, sign)


class Processes:
    """The processes of one flow run. Leaving the block ends every one that is still there, with its whole group."""

    def __init__(self, store_url: str) -> None:
        self._store_url = store_url
        self._asked: queue.Queue[_Request] = queue.Queue()
        self._started: list[_Request] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for request in self._started:
            request.stop(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for request in self._started:
            if not request.ended.wait(max(deadline - time.monotonic(), 0)):
                request.stop(signal.SIGKILL)
        while not self._asked.empty():
            self._asked.get().ended.set()

    def run(self, job_key: str, log: Callable[[str], None]) -> None:
        """Run the job to its end, from a task's thread. Raises JobRefused or JobFailed when it does not succeed."""
        words = [sys.executable, "-m", "model", self._store_url, job_key, "--parent", str(os.getpid())]
        request = _Request(words, log)
        if not self._closed:
            self._asked.put(request)
            request.ended.wait()
        if request.process is None:
            raise JobFailed(f"job {job_key!r} was not started: the flow is ending. Run the same command again.")
        code = request.process.returncode
        if code == USER_ERROR:
            raise JobRefused("\n".join(request.errors or request.tail))
        if code:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            lines = "\n".join(request.tail)
            raise JobFailed(f"job {job_key!r} {how}. Run the same command again: it goes on. Its last lines:\n{lines}")

    def serve(self, futures: list[PrefectConcurrentFuture[None]]) -> None:
        """Start what the tasks ask for, in the main thread, until all of them are done."""
        while not all(future.wrapped_future.done() for future in futures):
            try:
                request = self._asked.get(timeout=0.2)
            except queue.Empty:
                continue
            request.start()
            self._started.append(request)


def run_job(store: Store, job: Job, processes: Processes) -> Any:
    """Run a job in a process and return its result, from a task's thread; a job that is done is Skipped.

    Raises JobRefused or JobFailed, and keeps the reason in the store for `gpt2 status`.
    """
    if (result := read_result(store, job)) is not None:
        return Completed(name="Skipped", message="its result was there", data=result)
    try:
        processes.run(put_job(store, job), get_run_logger().info)
        if (result := read_result(store, job)) is None:
            raise JobFailed(
                f"job {job.job_id!r} stopped before its end, as it was asked to. Run the same command again."
            )
    except (JobFailed, ValueError) as error:
        note_failure(store, RunKeys(job.run).result(job.job_id), str(error))
        raise
    return result
